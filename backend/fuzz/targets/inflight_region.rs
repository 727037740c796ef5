//! A front-end with an arbitrary record of requests in flight, and a guest with an arbitrary ring, split or packed. The next
//! process must not panic, must not submit more than the ring holds, and must leave a record that the one after it believes, with
//! nothing in flight once all is complete.
//!
//! Input: the layout, the base, the record, guest memory.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::engine::guest_memory::GuestMemoryView;
use vhost_device_vfio::engine::inflight_region::Tracking;
use vhost_device_vfio::engine::virtqueue::Virtqueue;
use vhost_device_vfio::engine::virtqueue::chain::Chain;
use vhost_device_vfio::engine::{InflightRegion, Layout, VringSetup};
use vhost_device_vfio::memory::{MemTable, Region, RegionSpec, map_shared_file};
use vhost_device_vfio::sys::SharedMemory;

const SIZE: u16 = 8;
const DESC: u64 = 0;
const AVAIL: u64 = 0x80;
const USED: u64 = 0x100;
const MEMORY: u64 = 0x1000;

thread_local! {
    static MEMORIES: RefCell<(Arc<MemTable>, SharedMemory)> = RefCell::new(memories());
}

fn file(bytes: u64) -> File {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, bytes).unwrap();
    file
}

/// Guest memory, and memory for the record.
fn memories() -> (Arc<MemTable>, SharedMemory) {
    let gpa = Span::new(Gpa(0), MEMORY).unwrap();
    let region = Region::map(RegionSpec { gpa, qva: Qva(0), offset: 0, file: Arc::new(file(MEMORY)) }).unwrap();
    let table = MemTable::new(vec![Arc::new(region)]).unwrap();
    (Arc::new(table), map_shared_file(file(MEMORY), 0, MEMORY).unwrap())
}

/// Serves the ring until it is empty, as one process. `None` if the record is not believed.
fn serve(setup: &VringSetup, table: &Arc<MemTable>, record: &InflightRegion) -> Option<Tracking> {
    let mut ring = Virtqueue::new(setup, table).ok()?;
    let tracking = ring.track(record).ok()?;
    let (mut guest, mut chain, mut heads) = (GuestMemoryView::default(), Chain::default(), Vec::new());
    guest.publish(Arc::clone(table));
    while ring.take_recovered(&mut guest, &mut chain) {
        heads.push(chain.head());
    }
    assert!(heads.len() <= usize::from(SIZE));
    for _ in 0..ring.available().unwrap_or(0) {
        if heads.len() == usize::from(SIZE) || !ring.take(&mut guest, &mut chain).unwrap_or(false) {
            break;
        }
        heads.push(chain.head());
    }
    for pair in heads.chunks(2) {
        pair.iter().for_each(|head| ring.push_used(*head, 1));
        ring.publish();
    }
    Some(tracking)
}

fuzz_target!(|input: &[u8]| {
    let [layout, b0, b1, b2, b3, rest @ ..] = input else { return };
    let layout = if layout % 2 == 0 { Layout::Split } else { Layout::Packed };
    let bytes = InflightRegion::bytes(layout, SIZE).min(rest.len());
    MEMORIES.with_borrow(|(table, memory)| {
        let guest = table.regions()[0].memory();
        guest.clear();
        memory.clear();
        memory.copy_from(0, &rest[..bytes]);
        guest.copy_from(0, &rest[bytes..rest.len().min(bytes + 0x180)]);
        let region = InflightRegion::new(memory.clone(), layout, SIZE).unwrap();
        let [desc, avail, used] = [DESC, AVAIL, USED].map(|start| Span::new(Gpa(start), 0x80).unwrap());
        let setup = |base| VringSetup {
            index: 0,
            layout,
            size: SIZE,
            desc,
            avail,
            used,
            base,
            event_idx: false,
            indirect: true,
            kick: None,
            call: None,
            err: None,
            used_log: None,
            inflight: None,
        };
        if let Some(Tracking::On { .. }) = serve(&setup(u32::from_le_bytes([*b0, *b1, *b2, *b3])), table, &region) {
            let base = match layout {
                Layout::Split => u32::from(guest.read_u16(USED as usize + 2)),
                Layout::Packed => layout.first_base(),
            };
            let mut next = Virtqueue::new(&setup(base), table).unwrap();
            assert_eq!(next.track(&region), Ok(Tracking::On { recovered: 0 }));
        }
    });
});
