//! Guest memory and ring parameters for tests of a ring alone, without worker and device.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::addr::{Gpa, Qva, Span};
use crate::engine::{Layout, VringSetup};
use crate::memory::{Region, RegionSpec};

/// Guest memory of `bytes` bytes at address 0, and its file.
pub(super) fn region(bytes: u64) -> (Region, Arc<File>) {
    let file = Arc::new(File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()));
    ftruncate(&*file, bytes).unwrap();
    let gpa = Span::new(Gpa(0), bytes).unwrap();
    let spec = RegionSpec { gpa, qva: Qva(0), offset: 0, file: Arc::clone(&file) };
    (Region::map(spec).unwrap(), file)
}

/// Parameters of a new ring, with indirect descriptors and without EVENT_IDX. Each area has 4 KiB.
pub(super) fn setup(layout: Layout, size: u16, areas: [u64; 3]) -> VringSetup {
    let [desc, avail, used] = areas.map(|start| Span::new(Gpa(start), 0x1000).unwrap());
    VringSetup {
        index: 0,
        layout,
        size,
        desc,
        avail,
        used,
        base: layout.first_base(),
        event_idx: false,
        indirect: true,
        kick: None,
        call: None,
        err: None,
        used_log: None,
        inflight: None,
    }
}
