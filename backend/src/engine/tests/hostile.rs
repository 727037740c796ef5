//! A hostile driver on a split ring. Each invalid request completes with an error, or the ring fails and signals its err
//! eventfd. The next request, or the other ring, is served as before.

use std::time::Duration;

use super::disk::DiskOptions;
use super::rig::*;

/// Bytes of one block.
const BLOCK: u32 = 512;

fn rig() -> (Rig, SplitDriver) {
    let rig = Rig::new(DiskOptions::default());
    let driver = rig.driver(0, RingOptions { size: 16, ..RingOptions::default() });
    (rig, driver)
}

/// A well-formed read still succeeds.
fn still_serves(driver: &mut SplitDriver) -> bool {
    let sent = driver.send(IN, 0, &[(DATA, BLOCK)]);
    driver.wait(1) == [(u32::from(sent.head), BLOCK + 1)] && driver.status(sent) == 0
}

/// Makes `head` available. Returns the length in its used entry.
fn used_len(driver: &mut SplitDriver, head: u16) -> u32 {
    driver.offer(head);
    driver.kick();
    let used = driver.wait(1);
    assert_eq!(used[0].0, u32::from(head));
    used[0].1
}

#[test]
fn a_link_outside_the_table_gets_no_status() {
    let (rig, mut driver) = rig();
    let head = driver.raw(Desc { addr: DATA, len: 16, flags: NEXT, next: 16 });

    assert_eq!(used_len(&mut driver, head), 0);

    assert!(still_serves(&mut driver));
    assert_eq!(rig.engine.statistics().errors, 1);
}

#[test]
fn a_loop_of_descriptors_ends() {
    let (_rig, mut driver) = rig();
    let head = driver.raw(Desc { addr: DATA, len: 16, flags: NEXT, next: 1 });
    driver.raw(Desc { addr: DATA, len: 16, flags: NEXT, next: 0 });

    assert_eq!(used_len(&mut driver, head), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn a_loop_in_an_indirect_table_ends() {
    let (_rig, mut driver) = rig();
    driver.write_desc(DATA, 0, Desc { addr: DATA, len: 16, flags: NEXT, next: 1 });
    driver.write_desc(DATA, 1, Desc { addr: DATA, len: 16, flags: NEXT, next: 0 });
    let head = driver.raw(Desc { addr: DATA, len: 32, flags: INDIRECT, next: 0 });

    assert_eq!(used_len(&mut driver, head), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn a_nested_indirect_table_is_refused() {
    let (_rig, mut driver) = rig();
    driver.write_desc(DATA, 0, Desc { addr: DATA + 64, len: 16, flags: INDIRECT, next: 0 });
    let head = driver.raw(Desc { addr: DATA, len: 16, flags: INDIRECT, next: 0 });

    assert_eq!(used_len(&mut driver, head), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn an_indirect_descriptor_with_next_is_refused() {
    let (_rig, mut driver) = rig();
    let head = driver.raw(Desc { addr: DATA, len: 16, flags: INDIRECT | NEXT, next: 1 });

    assert_eq!(used_len(&mut driver, head), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn an_indirect_table_of_a_bad_length_is_refused() {
    let (_rig, mut driver) = rig();
    for len in [0, 8, 24, 1025 * 16, u32::MAX] {
        let head = driver.raw(Desc { addr: DATA, len, flags: INDIRECT, next: 0 });
        assert_eq!(used_len(&mut driver, head), 0, "{len}");
    }
    assert!(still_serves(&mut driver));
}

#[test]
fn an_indirect_table_outside_memory_is_refused() {
    let (_rig, mut driver) = rig();
    for addr in [0, BASE + LEN, BASE + LEN - 8, u64::MAX - 7] {
        let head = driver.raw(Desc { addr, len: 16, flags: INDIRECT, next: 0 });
        assert_eq!(used_len(&mut driver, head), 0, "{addr:#x}");
    }
    assert!(still_serves(&mut driver));
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_refused() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions::default());
    rig.engine.start_ring(crate::engine::VringSetup { indirect: false, ..setup }).unwrap();
    rig.engine.set_enabled(0, true);
    let head = driver.raw(Desc { addr: DATA, len: 48, flags: INDIRECT, next: 0 });

    assert_eq!(used_len(&mut driver, head), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn a_readable_buffer_after_a_writable_one_gets_an_error_status() {
    let (_rig, mut driver) = rig();
    let header = driver.header(IN, 0);
    let head = driver.link(&[(DATA, BLOCK, WRITE), (header, 16, 0), (header + 16, 1, WRITE)]);

    assert_eq!(used_len(&mut driver, head), 1);
    assert_eq!(driver.bytes(header + 16, 1), [1]);
    assert!(still_serves(&mut driver));
}

#[test]
fn a_chain_without_writable_buffers_is_returned_with_length_0() {
    let (_rig, mut driver) = rig();
    let header = driver.header(OUT, 0);
    let head = driver.link(&[(header, 16, 0), (DATA, BLOCK, 0)]);

    assert_eq!(used_len(&mut driver, head), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn a_short_or_missing_header_gets_an_error_status() {
    let (_rig, mut driver) = rig();
    let header = driver.header(IN, 0);
    for parts in [vec![(header, 15, 0), (header + 16, 1, WRITE)], vec![(header + 16, 1, WRITE)]] {
        driver.fill(header + 16, &[0xff]);
        let head = driver.link(&parts);
        assert_eq!(used_len(&mut driver, head), 1);
        assert_eq!(driver.bytes(header + 16, 1), [1]);
    }
    assert!(still_serves(&mut driver));
}

#[test]
fn a_header_outside_memory_gets_an_error_status() {
    let (_rig, mut driver) = rig();
    let header = driver.header(IN, 0);
    let head = driver.link(&[(BASE + LEN - 8, 16, 0), (header + 16, 1, WRITE)]);

    assert_eq!(used_len(&mut driver, head), 1);
    assert_eq!(driver.bytes(header + 16, 1), [1]);
    assert!(still_serves(&mut driver));
}

#[test]
fn a_status_byte_outside_memory_is_not_written() {
    let (_rig, mut driver) = rig();
    let header = driver.header(IN, 0);
    for place in [BASE + LEN, 0, u64::MAX] {
        let head = driver.link(&[(header, 16, 0), (DATA, BLOCK, WRITE), (place, 1, WRITE)]);
        assert_eq!(used_len(&mut driver, head), 0, "{place:#x}");
    }
    assert!(still_serves(&mut driver));
}

#[test]
fn data_outside_memory_gets_an_error_status_and_no_command() {
    let (rig, mut driver) = rig();
    for place in [BASE + LEN - 256, BASE + LEN, 0, u64::MAX - 511, u64::MAX - 10] {
        for kind in [IN, OUT] {
            let sent = driver.send(kind, 0, &[(place, BLOCK)]);
            assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)], "{place:#x}");
            assert_eq!(driver.status(sent), 1);
        }
    }
    assert_eq!(rig.disk.doorbells(), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn data_of_the_wrong_direction_gets_an_error_status() {
    let (_rig, mut driver) = rig();
    for (kind, flags) in [(IN, 0), (OUT, WRITE)] {
        let header = driver.header(kind, 0);
        let head = driver.link(&[(header, 16, 0), (DATA, BLOCK, flags), (header + 16, 1, WRITE)]);
        assert_eq!(used_len(&mut driver, head), 1);
        assert_eq!(driver.bytes(header + 16, 1), [1]);
    }
    assert!(still_serves(&mut driver));
}

#[test]
fn sectors_past_the_end_get_an_error_status() {
    let (rig, mut driver) = rig();
    let sectors = 2048;
    for (sector, len) in [(sectors, BLOCK), (sectors - 1, 2 * BLOCK), (u64::MAX, BLOCK), (u64::MAX - 1, 2 * BLOCK)] {
        let sent = driver.send(IN, sector, &[(DATA, len)]);
        assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)], "{sector}");
        assert_eq!(driver.status(sent), 1);
    }
    assert_eq!(rig.disk.doorbells(), 0);

    let last = driver.send(IN, sectors - 1, &[(DATA, BLOCK)]);
    driver.wait(1);
    assert_eq!(driver.status(last), 0);
}

#[test]
fn partial_blocks_get_an_error_status() {
    let mut options = DiskOptions::default();
    (options.geometry.block_size, options.geometry.blocks) = (4096, 64);
    let rig = Rig::new(options);
    let mut driver = rig.driver(0, RingOptions::default());
    for (sector, len) in [(0, 512), (1, 4096), (8, 4097), (8, 1), (7, 8192)] {
        let sent = driver.send(IN, sector, &[(DATA, len)]);
        assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)], "{sector} {len}");
        assert_eq!(driver.status(sent), 1);
    }
    let whole = driver.send(IN, 8 * 63, &[(DATA, 4096)]);
    driver.wait(1);
    assert_eq!(driver.status(whole), 0);
}

#[test]
fn a_transfer_of_zero_bytes_succeeds_without_the_device() {
    let (rig, mut driver) = rig();
    let sent = driver.send(IN, 0, &[]);
    assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)]);
    assert_eq!(driver.status(sent), 0);
    assert_eq!(rig.disk.doorbells(), 0);
}

#[test]
fn writes_to_a_read_only_disk_are_refused() {
    let mut options = DiskOptions::default();
    options.geometry.read_only = true;
    let rig = Rig::new(options);
    let mut driver = rig.driver(0, RingOptions::default());

    let sent = driver.send(OUT, 0, &[(DATA, BLOCK)]);

    driver.wait(1);
    assert_eq!(driver.status(sent), 1);
    assert_eq!(rig.disk.doorbells(), 0);
    assert!(still_serves(&mut driver));
}

#[test]
fn an_unknown_request_type_is_unsupported() {
    let (_rig, mut driver) = rig();
    for kind in [2, 3, 5, 12, 14, 0x8000_0000, u32::MAX] {
        let sent = driver.send(kind, 0, &[]);
        assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)]);
        assert_eq!(driver.status(sent), 2);
    }
    assert!(still_serves(&mut driver));
}

#[test]
fn a_jump_of_the_avail_index_fails_the_ring_and_no_other() {
    let (rig, mut driver) = rig();
    let mut other = rig.driver(1, RingOptions::default());

    driver.set_avail_idx(17);
    driver.kick();

    assert!(wait_readable(&driver.err, Duration::from_secs(20)));
    assert!(still_serves(&mut other));
    driver.set_avail_idx(0);
    driver.request(IN, 0, &[(DATA, BLOCK)]);
    driver.kick();
    assert!(still_serves(&mut other));
    assert_eq!(driver.used_idx(), 0);
    assert_eq!(count(&driver.err), 1);

    // After a restart the ring is served again.
    assert_eq!(rig.engine.stop_ring(0).unwrap(), Some(0));
    let mut driver = rig.driver(0, RingOptions { size: 16, ..RingOptions::default() });
    assert!(still_serves(&mut driver));
}

#[test]
fn a_head_outside_the_table_fails_the_ring() {
    let (rig, mut driver) = rig();
    let mut other = rig.driver(1, RingOptions::default());

    driver.offer(16);
    driver.kick();

    assert!(wait_readable(&driver.err, Duration::from_secs(20)));
    assert!(still_serves(&mut other));
    assert_eq!(driver.used_idx(), 0);
    assert_eq!(rig.engine.stop_ring(0).unwrap(), Some(0));
}

#[test]
fn a_chain_made_available_repeatedly_does_not_exceed_the_ring_size() {
    let rig = Rig::new(DiskOptions { depth: 1024, ..DiskOptions::default() });
    let mut driver = rig.driver(0, RingOptions { size: 16, ..RingOptions::default() });
    rig.disk.hold();

    let head = driver.request(IN, 0, &[(DATA, BLOCK)]).head;
    (0..15).for_each(|_| driver.offer(head));
    driver.kick();
    wait_until("a ring's worth in flight", || rig.disk.held().len() == 16);
    (0..16).for_each(|_| driver.offer(head));
    driver.kick();
    let mut other = rig.driver(1, RingOptions::default());
    let sent = other.send(99, 0, &[]);
    assert_eq!(other.wait(1), [(u32::from(sent.head), 1)]);
    assert_eq!(rig.disk.held().len(), 16);

    rig.disk.resume();
    wait_until("both rounds", || driver.used_idx() == 32);
}

#[test]
fn a_ring_with_invalid_parameters_is_not_started() {
    use crate::addr::{Gpa, Span};
    use crate::engine::{EngineError, VringSetup};
    let rig = Rig::new(DiskOptions::default());
    let setup = |change: &dyn Fn(&mut VringSetup)| {
        let (_, mut setup) = rig.stopped_driver(0, RingOptions::default());
        change(&mut setup);
        rig.engine.start_ring(setup)
    };
    let at = |start, len| Span::new(Gpa(start), len).unwrap();

    assert!(matches!(setup(&|s| s.size = 0), Err(EngineError::RingSize { size: 0, .. })));
    assert!(matches!(setup(&|s| s.size = 48), Err(EngineError::RingSize { .. })));
    assert!(matches!(setup(&|s| s.size = 2048), Err(EngineError::RingSize { .. })));
    assert!(matches!(setup(&|s| s.desc = at(BASE, 1023)), Err(EngineError::RingArea { .. })));
    assert!(matches!(setup(&|s| s.desc = at(BASE + 8, 1024)), Err(EngineError::RingArea { .. })));
    assert!(matches!(setup(&|s| s.avail = at(BASE + 1, 134)), Err(EngineError::RingArea { .. })));
    assert!(matches!(setup(&|s| s.used = at(BASE + LEN - 4, 518)), Err(EngineError::RingArea { .. })));
    assert!(matches!(setup(&|s| s.index = 4), Err(EngineError::NoSuchRing { .. })));
    assert!(setup(&|_| ()).is_ok());
    assert!(matches!(setup(&|_| ()), Err(EngineError::RingRunning(0))));
}
