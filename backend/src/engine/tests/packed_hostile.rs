//! A hostile driver on a packed ring. The same code checks requests of both layouts, so each invalid request is made on both
//! and must end alike. Faults of the packed ring itself have their own tests.

use super::disk::DiskOptions;
use super::packed_driver::PackedDriver;
use super::rig::*;
use crate::addr::{Gpa, Span};
use crate::engine::{EngineError, Layout};

const BLOCK: u32 = 512;

/// Virtqueue 0 split, virtqueue 1 packed.
fn rig() -> (Rig, SplitDriver, PackedDriver) {
    let rig = Rig::new(DiskOptions::default());
    let shape = RingOptions { size: 16, ..RingOptions::default() };
    let split = rig.driver(0, shape);
    let (packed, setup) = PackedDriver::new(rig.region.memory().clone(), 1, shape);
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(1, true);
    (rig, split, packed)
}

/// A well-formed read succeeds.
fn still_serves(driver: &mut PackedDriver) -> bool {
    let sent = driver.send(IN, 0, &[(DATA, BLOCK)]);
    driver.wait(1) == [(u32::from(sent.head), BLOCK + 1)] && driver.guest.status(sent) == 0
}

/// Makes these descriptors available. Returns the length in their used descriptor.
fn used_len(driver: &mut PackedDriver, parts: &[Desc]) -> u32 {
    let id = driver.offer(parts);
    driver.guest.kick();
    let used = driver.wait(1);
    assert_eq!(used[0].0, u32::from(id));
    used[0].1
}

fn desc(addr: u64, len: u32, flags: u16) -> Desc {
    Desc { addr, len, flags, next: 0 }
}

#[test]
fn an_invalid_request_ends_as_on_a_split_ring() {
    let (rig, mut split, mut packed) = rig();
    const NOWHERE: u64 = 0x10;
    let end = BASE + LEN;
    type Parts = Vec<(u64, u32, u16)>;
    let around = |kind: u32, sector: u64, driver: &mut SplitDriver, data: &[(u64, u32, u16)]| -> (Parts, u64) {
        let header = driver.header(kind, sector);
        let parts = [&[(header, 16, 0)], data, &[(header + 16, 1, WRITE)]].concat();
        (parts, header + 16)
    };
    type Case = (&'static str, u32, u64, Parts);
    let cases: Vec<Case> = vec![
        ("right", IN, 0, vec![(DATA, BLOCK, WRITE)]),
        ("readable after writable", IN, 0, vec![(DATA, BLOCK, WRITE), (DATA, BLOCK, 0)]),
        ("data outside memory", IN, 0, vec![(NOWHERE, BLOCK, WRITE)]),
        ("data over the end of memory", IN, 0, vec![(end - 256, BLOCK, WRITE)]),
        ("data that wraps", IN, 0, vec![(u64::MAX - 100, BLOCK, WRITE)]),
        ("readable data in a read", IN, 0, vec![(DATA, BLOCK, 0)]),
        ("writable data in a write", OUT, 0, vec![(DATA, BLOCK, WRITE)]),
        ("part of a block", IN, 0, vec![(DATA, 100, WRITE)]),
        ("past the end", IN, 2048, vec![(DATA, BLOCK, WRITE)]),
        ("a sector that overflows", OUT, u64::MAX, vec![(DATA, BLOCK, 0)]),
        ("empty buffers", IN, 0, vec![(DATA, 0, WRITE), (DATA, BLOCK, WRITE), (NOWHERE, 0, WRITE)]),
        ("nothing at all", IN, 0, vec![]),
        ("an unknown request", 0xffff, 0, vec![]),
    ];
    for (name, kind, sector, data) in cases {
        let (parts, split_status) = around(kind, sector, &mut split, &data);
        let head = split.link(&parts);
        split.offer(head);
        split.kick();
        let split_len = split.wait(1)[0].1;
        for table in [None, Some(DATA + 0x1_0000)] {
            let (parts, status) = around(kind, sector, &mut packed.guest, &data);
            packed.offer_linked(&parts, table);
            packed.guest.kick();

            assert_eq!(packed.wait(1)[0].1, split_len, "{name}, table {table:?}");
            assert_eq!(packed.guest.bytes(status, 1), split.bytes(split_status, 1), "{name}, table {table:?}");
        }
    }
    assert!(still_serves(&mut packed));
    assert_ne!(rig.engine.statistics().errors, 0);
}

#[test]
fn a_chain_without_a_status_byte_or_header_is_returned() {
    let (_rig, _split, mut packed) = rig();
    let header = packed.guest.header(IN, 0);
    for (name, parts) in [
        ("nothing writable", vec![desc(header, 16, NEXT), desc(DATA, 1, 0)]),
        ("status outside memory", vec![desc(header, 16, NEXT), desc(0x10, 1, WRITE)]),
        ("nothing at all", vec![desc(header, 0, 0)]),
    ] {
        assert_eq!(used_len(&mut packed, &parts), 0, "{name}");
    }
    let status = DATA + 64;
    packed.guest.fill(status, &[0xff]);
    assert_eq!(used_len(&mut packed, &[desc(header, 15, NEXT), desc(status, 1, WRITE)]), 1);
    assert_eq!(packed.guest.bytes(status, 1), [1], "a short header");
    assert!(still_serves(&mut packed));
}

#[test]
fn bad_indirect_descriptors_are_refused_and_use_one_descriptor() {
    let (_rig, _split, mut packed) = rig();
    let table = DATA + 0x1_0000;
    packed.write_entry(table, desc(DATA, 16, INDIRECT));
    for (name, parts) in [
        ("inside another", vec![desc(table, 16, INDIRECT)]),
        ("no entries", vec![desc(table, 0, INDIRECT)]),
        ("part of an entry", vec![desc(table, 24, INDIRECT)]),
        ("too many entries", vec![desc(table, 16 * 1025, INDIRECT)]),
        ("more entries than sixteen bits", vec![desc(table, u32::MAX - 15, INDIRECT)]),
        ("outside memory", vec![desc(0x10, 16, INDIRECT)]),
        ("past the end of addresses", vec![desc(u64::MAX - 7, 16, INDIRECT)]),
        ("first of a chain", vec![desc(table, 16, INDIRECT | NEXT), desc(DATA, 1, WRITE)]),
        ("last of a chain", vec![desc(DATA, 16, NEXT), desc(table, 16, INDIRECT)]),
    ] {
        assert_eq!(used_len(&mut packed, &parts), 0, "{name}");
        assert!(still_serves(&mut packed), "{name}");
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_refused() {
    let rig = Rig::new(DiskOptions::default());
    let (mut packed, mut setup) = PackedDriver::new(rig.region.memory().clone(), 0, RingOptions::default());
    setup.indirect = false;
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    packed.write_entry(DATA, desc(DATA, 1, WRITE));

    assert_eq!(used_len(&mut packed, &[desc(DATA, 16, INDIRECT)]), 0);
    assert!(still_serves(&mut packed));
}

#[test]
fn an_indirect_table_may_cross_a_region_boundary() {
    let rig = Rig::new(DiskOptions::default());
    let far = region(BASE + LEN, 0x1000);
    rig.engine.publish(std::sync::Arc::new(rig.table.with(far.clone()).unwrap()));
    let (mut packed, setup) = PackedDriver::new(rig.region.memory().clone(), 0, RingOptions::default());
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    let (header, table) = (packed.guest.header(GET_ID, 0), BASE + LEN - 32);
    packed.write_entry(table, desc(header, 16, 0));
    packed.write_entry(table + 16, desc(DATA, 20, WRITE));
    far.memory().write_u64(0, header + 16);
    far.memory().write_u32(8, 1);
    far.memory().write_u16(14, WRITE);

    assert_eq!(used_len(&mut packed, &[desc(table, 48, INDIRECT)]), 21);
    assert_eq!(packed.guest.bytes(DATA, 6), b"SERIAL");
}

#[test]
fn a_chain_without_an_end_fails_the_ring_and_no_other() {
    let (rig, mut split, packed) = rig();
    for slot in 0..packed.size {
        packed.put(slot, desc(DATA, 16, NEXT), 0, packed.flags_at(0));
    }
    packed.guest.kick();

    assert!(wait_readable(&packed.guest.err, std::time::Duration::from_secs(20)));

    split.send(IN, 0, &[(DATA, BLOCK)]);
    split.wait(1);
    assert_eq!(rig.engine.stop_ring(1).unwrap(), Some(0x8000_8000), "nothing has been taken");
    let (mut fresh, setup) = PackedDriver::new(rig.region.memory().clone(), 1, RingOptions::default());
    rig.engine.start_ring(setup).unwrap();
    assert!(still_serves(&mut fresh));
}

#[test]
fn descriptors_made_available_before_they_are_used_are_not_taken() {
    let (rig, mut split, _packed) = rig();
    let (mut packed, setup) =
        PackedDriver::new(rig.region.memory().clone(), 2, RingOptions { size: 15, ..RingOptions::default() });
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(2, true);
    rig.disk.hold();
    while packed.has_room(3) {
        packed.send(IN, 0, &[(DATA, BLOCK)]);
    }
    wait_until("the requests are taken", || rig.disk.held().len() == 5);
    // Make the whole ring available for the next round, while the device still owns all of it.
    for slot in 0..packed.size {
        packed.put(slot, desc(DATA, 1, WRITE), 0x7777, packed.flags_at(packed.size));
    }
    packed.guest.kick();
    split.send(GET_ID, 0, &[(DATA, 20)]);
    split.wait(1);
    assert_eq!(rig.disk.held().len(), 5);

    rig.disk.resume();

    // The chains are returned with the IDs under which they were taken. Nothing more is taken, because the used descriptors
    // have replaced the available ones.
    assert_eq!(rig.engine.stop_ring(2).unwrap(), Some(0), "both positions are one round later");
    assert_eq!(rig.engine.statistics().reads, 5);
}

#[test]
fn a_packed_ring_with_invalid_parameters_is_not_started() {
    let rig = Rig::new(DiskOptions::default());
    let make =
        || PackedDriver::new(rig.region.memory().clone(), 0, RingOptions { size: 100, ..RingOptions::default() }).1;
    let at = |start, len| Span::new(Gpa(start), len).unwrap();
    for size in [0, 1025, u16::MAX] {
        let mut setup = make();
        setup.size = size;
        let refused = rig.engine.start_ring(setup).unwrap_err();
        assert!(matches!(refused, EngineError::RingSize { layout: Layout::Packed, .. }), "{refused}");
    }
    for base in [0x8000_8064, 0x8064_8000, 0x8001_8000, 100] {
        let mut setup = make();
        setup.base = base;
        let refused = rig.engine.start_ring(setup).unwrap_err();
        assert!(matches!(refused, EngineError::RingBase { .. }), "{base:#x}: {refused}");
    }
    let areas = [
        (at(BASE + 8, 1600), at(BASE, 4), at(BASE + 8, 4)),
        (at(BASE, 1599), at(BASE, 4), at(BASE + 8, 4)),
        (at(BASE, 1600), at(BASE + 2, 4), at(BASE + 8, 4)),
        (at(BASE, 1600), at(BASE, 4), at(BASE + 2, 4)),
        (at(BASE, 1600), at(BASE, 2), at(BASE + 8, 4)),
        (at(BASE + LEN - 1584, 1600), at(BASE, 4), at(BASE + 8, 4)),
        (at(BASE, 1600), at(0x1000, 4), at(BASE + 8, 4)),
        (at(BASE, 1600), at(BASE, 4), at(BASE + LEN, 4)),
    ];
    for (desc, avail, used) in areas {
        let mut setup = make();
        (setup.desc, setup.avail, setup.used) = (desc, avail, used);
        let refused = rig.engine.start_ring(setup).unwrap_err();
        assert!(matches!(refused, EngineError::RingArea { .. }), "{desc} {avail} {used}: {refused}");
    }
    rig.engine.start_ring(make()).unwrap();
}

#[test]
fn a_split_ring_with_a_packed_rings_size_or_base_is_not_started() {
    let rig = Rig::new(DiskOptions::default());
    let (_driver, mut setup) = rig.stopped_driver(0, RingOptions::default());
    setup.size = 48;
    let refused = rig.engine.start_ring(setup).unwrap_err();
    assert!(matches!(refused, EngineError::RingSize { layout: Layout::Split, .. }), "{refused}");
    let (_driver, mut setup) = rig.stopped_driver(0, RingOptions::default());
    setup.base = 0x1_0000;
    let refused = rig.engine.start_ring(setup).unwrap_err();
    assert!(matches!(refused, EngineError::RingBase { .. }), "{refused}");
}
