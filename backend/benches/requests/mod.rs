//! Guest memory with requests in it: 4 KiB reads of three descriptors, on a split ring.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::engine::{Layout, VringSetup};
use vhost_device_vfio::memory::{MemTable, Region, RegionSpec};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

pub(crate) const SIZE: u16 = 256;
const REGION: u64 = 16 << 20;
/// From one region to the next. The gap keeps regions from being merged.
pub(crate) const STRIDE: u64 = 2 * REGION;
pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x3000;
pub(crate) const USED: u64 = 0x5000;
const HEADERS: u64 = 0x1_0000;
pub(crate) const TABLES: u64 = 0x2_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// The same guest memory, mapped once for this crate and once for `virtio-queue`.
pub(crate) struct Memory {
    pub(crate) ours: Arc<MemTable>,
    pub(crate) theirs: GuestMemoryMmap,
}

/// `regions` regions, with a gap after each.
pub(crate) fn memory(regions: u64) -> Memory {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for n in 0..regions {
        let start = n * STRIDE;
        let file = Arc::new(File::from(memfd_create("bench", MemfdFlags::CLOEXEC).unwrap()));
        ftruncate(&*file, REGION).unwrap();
        let gpa = Span::new(Gpa(start), REGION).unwrap();
        ours.push(Arc::new(Region::map(RegionSpec { gpa, qva: Qva(start), offset: 0, file: file.clone() }).unwrap()));
        let len = usize::try_from(REGION).unwrap();
        theirs.push((GuestAddress(start), len, Some(FileOffset::from_arc(file, 0))));
    }
    Memory {
        ours: Arc::new(MemTable::new(ours).unwrap()),
        theirs: GuestMemoryMmap::from_ranges_with_files(theirs).unwrap(),
    }
}

/// Writes requests into guest memory: 4 KiB reads of three descriptors each, with data in all regions in turn, from the one at `base`
/// on. The ring is in the first one.
pub(crate) fn fill(memory: &GuestMemoryMmap, base: u64, regions: u64, indirect: bool) {
    let put = |at: u64, addr: u64, len: u32, flags: u16, next: u16| {
        memory.write_obj(addr, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    };
    for n in 0..u64::from(SIZE / 4) {
        let header = base + HEADERS + 32 * n;
        memory.write_obj(0_u64, GuestAddress(header)).unwrap();
        memory.write_obj(8 * n, GuestAddress(header + 8)).unwrap();
        let data = base + (n % regions) * STRIDE + 0x10_0000 + 4096 * n;
        let (tables, descriptors) = (base + TABLES, base + DESC);
        let head = u16::try_from(4 * n).unwrap();
        let (table, first) = if indirect { (tables + 64 * n, 0) } else { (descriptors + 64 * n, head) };
        put(table, header, 16, NEXT, first + 1);
        put(table + 16, data, 4096, NEXT | WRITE, first + 2);
        put(table + 32, header + 16, 1, WRITE, 0);
        if indirect {
            put(descriptors + 64 * n, table, 48, INDIRECT, 0);
        }
    }
    for n in 0..SIZE {
        memory.write_obj((n * 4) % SIZE, GuestAddress(base + AVAIL + 4 + 2 * u64::from(n))).unwrap();
    }
}

/// A split ring of these requests, in the region at `base`.
pub(crate) fn setup(base: u64) -> VringSetup {
    let span = |start, len| Span::new(Gpa(base + start), len).unwrap();
    VringSetup {
        index: 0,
        layout: Layout::Split,
        size: SIZE,
        desc: span(DESC, 0x1000),
        avail: span(AVAIL, 0x1000),
        used: span(USED, 0x1000),
        base: 0,
        event_idx: true,
        indirect: true,
        kick: None,
        call: None,
        err: None,
        used_log: None,
        inflight: None,
    }
}
