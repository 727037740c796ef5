//! Records of other writers, records that contradict themselves, and records of random bytes.

mod hostile;
mod packed;
mod split;

use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::sys::SharedMemory;

/// Memory that starts with `bytes`; the rest is zero.
fn memory(bytes: &[u8]) -> SharedMemory {
    let memory = SharedMemory::of(Arc::new(MmapRegion::new(0x1000).unwrap()));
    memory.copy_from(0, bytes);
    memory
}
