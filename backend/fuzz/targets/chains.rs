//! A guest with an arbitrary ring, split or packed: the input is the contents of guest memory. The device must not panic, must
//! complete every chain it takes, and must not use a buffer outside guest memory.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::driver::{Geometry, ZoneGeometry};
use vhost_device_vfio::engine::virtqueue::chain::Chain;
use vhost_device_vfio::engine::guest_memory::GuestMemoryView;
use vhost_device_vfio::engine::LiveGeometry;
use vhost_device_vfio::engine::request::{Data, Disk, Status, parse};
use vhost_device_vfio::engine::virtqueue::Virtqueue;
use vhost_device_vfio::engine::{Layout, VringSetup};
use vhost_device_vfio::memory::{MemTable, Region, RegionSpec};

const SIZE: u16 = 16;
const DESC: u64 = 0;
const AVAIL: u64 = 0x100;
const USED: u64 = 0x140;
/// Two regions with a gap between them.
const REGIONS: [(u64, u64); 2] = [(0, 0x1000), (0x3000, 0x2000)];

thread_local! {
    static TABLE: RefCell<Arc<MemTable>> = RefCell::new(Arc::new(table()));
}

fn table() -> MemTable {
    let regions = REGIONS.map(|(start, len)| {
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, len).unwrap();
        let gpa = Span::new(Gpa(start), len).unwrap();
        Arc::new(Region::map(RegionSpec { gpa, qva: Qva(start), offset: 0, file: Arc::new(file) }).unwrap())
    });
    MemTable::new(regions.to_vec()).unwrap()
}

fn serve(layout: Layout, zones: Option<ZoneGeometry>, table: &Arc<MemTable>) {
    let [desc, avail, used] = layout.areas(SIZE, true).map(|area| area.bytes);
    let span = |start, len| Span::new(Gpa(start), len).unwrap();
    let setup = VringSetup {
        index: 0,
        layout,
        size: SIZE,
        desc: span(DESC, desc),
        avail: span(AVAIL, avail),
        used: span(USED, used),
        base: layout.first_base(),
        event_idx: true,
        indirect: true,
        kick: None,
        call: None,
        err: None,
        used_log: None,
        inflight: None,
    };
    let geometry = Geometry { blocks: 1 << 20, block_size: 512, physical_block_size: 4096, zones, ..Geometry::default() };
    let disk = Disk::new(&geometry, Arc::new(LiveGeometry::of(&geometry)));
    let mut ring = Virtqueue::new(&setup, table).unwrap();
    let mut guest = GuestMemoryView::default();
    guest.publish(Arc::clone(table));
    let (mut chain, mut data) = (Chain::default(), Data::default());
    let Ok(available) = ring.available() else { return };
    for _ in 0..available {
        if !matches!(ring.take(&mut guest, &mut chain), Ok(true)) {
            return;
        }
        let (pending_used, _) = parse(&chain, &mut guest, &disk, &mut data);
        for buffer in data.buffers.iter().chain(&data.append_sector) {
            let inside = |(start, len): &(u64, u64)| buffer.start().0 >= *start && buffer.last().0 < start + len;
            assert!(REGIONS.iter().any(inside), "{buffer} is not guest memory");
        }
        if let Some(status) = pending_used.status() {
            guest.write_status(status, Status::Ok as u8);
        }
        ring.push_used(pending_used.complete(), 1);
    }
    ring.publish();
    ring.arm();
}

fuzz_target!(|memory: &[u8]| {
    TABLE.with_borrow(|table| {
        let zones = Some(ZoneGeometry { blocks: 1 << 12, max_open: 0, max_active: 0, max_append: 1 << 16 });
        for (layout, zones) in [(Layout::Split, None), (Layout::Packed, None), (Layout::Split, zones)] {
            let mut rest = memory;
            for region in table.regions() {
                let part = rest.len().min(region.memory().len());
                region.memory().clear();
                region.memory().copy_from(0, &rest[..part]);
                rest = &rest[part..];
            }
            serve(layout, zones, table);
        }
    });
});
