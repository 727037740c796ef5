//! A ring in a memory of its own, without a worker or a device, for tests that look at the ring alone.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::addr::{Gpa, Qva, Span};
use crate::engine::{Layout, VringSetup};
use crate::memory::{Region, RegionSpec};

/// Guest memory of `bytes` from address 0, and the file it lies in.
pub(super) fn region(bytes: u64) -> (Region, Arc<File>) {
    let file = Arc::new(File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()));
    ftruncate(&*file, bytes).unwrap();
    let gpa = Span::new(Gpa(0), bytes).unwrap();
    let spec = RegionSpec { gpa, qva: Qva(0), offset: 0, file: Arc::clone(&file) };
    (Region::map(spec).unwrap(), file)
}

/// A ring that has not run, with indirect descriptors and without event index; each area may have 4 KiB.
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
    }
}
