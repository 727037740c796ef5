//! Requests of every type, from the avail ring to the used ring.

use super::disk::DiskOptions;
use super::rig::*;
use crate::driver::Outcome;

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn written_data_reads_back() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let written = pattern(1, 8192);
    driver.fill(DATA, &written);

    let write = driver.send(OUT, 8, &[(DATA, 4096), (DATA + 4096, 4096)]);
    assert_eq!(driver.wait(1), [(u32::from(write.head), 1)]);
    let read = driver.send(IN, 8, &[(DATA + 0x1_0000, 8192)]);
    assert_eq!(driver.wait(1), [(u32::from(read.head), 8193)]);

    assert_eq!((driver.status(write), driver.status(read)), (0, 0));
    assert_eq!(driver.bytes(DATA + 0x1_0000, 8192), written);
    assert_eq!(rig.disk.read(4096, 8192), written);
    let statistics = rig.engine.statistics();
    assert_eq!((statistics.reads, statistics.bytes_read), (1, 8192));
    assert_eq!((statistics.writes, statistics.bytes_written), (1, 8192));
    assert_eq!(statistics.errors, 0);
}

#[test]
fn misaligned_buffers_are_bounced_in_both_directions() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let written = pattern(7, 1024);
    driver.fill(DATA + 1, &written);

    let write = driver.send(OUT, 0, &[(DATA + 1, 300), (DATA + 301, 724)]);
    driver.wait(1);
    let read = driver.send(IN, 0, &[(DATA + 0x1003, 1000), (DATA + 0x2001, 24)]);
    driver.wait(1);

    assert_eq!((driver.status(write), driver.status(read)), (0, 0));
    assert_eq!(rig.disk.read(0, 1024), written);
    assert_eq!(driver.bytes(DATA + 0x1003, 1000), written[..1000]);
    assert_eq!(driver.bytes(DATA + 0x2001, 24), written[1000..]);
    assert_eq!(rig.engine.statistics().bounced, 2);
}

#[test]
fn bounced_requests_wait_for_free_slots() {
    let rig = Rig::new(DiskOptions { depth: 1024, ..DiskOptions::default() });
    let mut driver = rig.driver(0, RingOptions::default());
    let written = pattern(3, 0x10_0000);
    rig.disk.write(0, &written);
    rig.disk.hold();

    // Each request needs all 16 slots of 64 KiB.
    let one = driver.request(IN, 0, &[(DATA + 1, 0xf_fe00)]);
    let two = driver.request(IN, 0, &[(DATA + 1, 0xf_fe00)]);
    driver.kick();
    wait_until("all slots in use", || rig.disk.held().len() == 16);
    rig.disk.resume();
    driver.wait(2);

    assert_eq!((driver.status(one), driver.status(two)), (0, 0));
    assert_eq!(driver.bytes(DATA + 1, 0xf_fe00), written[..0xf_fe00]);
    assert_eq!(rig.engine.statistics().bounced, 32);
}

#[test]
fn a_long_request_is_split_into_commands_and_completed_once() {
    let rig = Rig::new(DiskOptions { max_transfer: 4096, ..DiskOptions::default() });
    let mut driver = rig.driver(0, RingOptions::default());
    let written = pattern(9, 0x1_0000);
    driver.fill(DATA, &written);
    rig.disk.hold();

    let write = driver.send(OUT, 0, &[(DATA, 0x1_0000)]);
    wait_until("sixteen commands", || rig.disk.held().len() == 16);
    while rig.disk.held().len() > 1 {
        rig.disk.complete(rig.disk.held().len() - 1);
    }
    assert_eq!(driver.used_idx(), 0);
    rig.disk.complete(0);

    assert_eq!(driver.wait(1), [(u32::from(write.head), 1)]);
    assert_eq!(driver.status(write), 0);
    assert_eq!(rig.disk.read(0, 0x1_0000), written);
}

#[test]
fn the_worst_outcome_is_the_requests_status() {
    let rig = Rig::new(DiskOptions { max_transfer: 4096, ..DiskOptions::default() });
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    let read = driver.send(IN, 0, &[(DATA, 3 * 4096)]);
    wait_until("three commands", || rig.disk.held().len() == 3);

    rig.disk.set_outcome(Outcome::Failed);
    rig.disk.complete(1);
    rig.disk.set_outcome(Outcome::Unsupported);
    rig.disk.complete(1);
    rig.disk.set_outcome(Outcome::Success);
    rig.disk.complete(0);

    assert_eq!(driver.wait(1), [(u32::from(read.head), 1)]);
    assert_eq!(driver.status(read), 1);
    assert_eq!(rig.engine.statistics().errors, 1);
}

#[test]
fn the_rest_of_a_request_is_not_submitted_after_a_failed_command() {
    let rig = Rig::new(DiskOptions { depth: 1, max_transfer: 4096, ..DiskOptions::default() });
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    let read = driver.send(IN, 0, &[(DATA, 8 * 4096)]);
    wait_until("the first command", || rig.disk.held().len() == 1);

    rig.disk.set_outcome(Outcome::Failed);
    rig.disk.complete(0);

    assert_eq!(driver.wait(1), [(u32::from(read.head), 1)]);
    assert_eq!((driver.status(read), rig.disk.doorbells()), (1, 1));
}

#[test]
fn used_entries_are_in_completion_order() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    let sent: Vec<_> = (0..3).map(|n| driver.request(IN, n, &[(DATA + 512 * n, 512)])).collect();
    driver.kick();
    wait_until("three commands", || rig.disk.held().len() == 3);

    for index in [2, 0, 0] {
        let before = driver.used_idx();
        rig.disk.complete(index);
        wait_until("its used entry", || driver.used_idx() == before.wrapping_add(1));
    }

    let heads: Vec<_> = driver.used().iter().map(|&(head, _)| head).collect();
    assert_eq!(heads, [sent[2], sent[0], sent[1]].map(|sent| u32::from(sent.head)));
}

#[test]
fn requests_wait_for_room_in_a_full_device_queue() {
    let rig = Rig::new(DiskOptions { depth: 3, max_transfer: 1024, ..DiskOptions::default() });
    let mut drivers: Vec<_> = (0..4).map(|n| rig.driver(n, RingOptions::default())).collect();
    rig.disk.write(0, &pattern(5, 0x1_0000));

    for driver in &mut drivers {
        for n in 0..10 {
            driver.request(IN, 4 * n, &[(DATA + 0x4000 * driver.index as u64 + 2048 * n, 2048)]);
        }
    }
    drivers.iter().for_each(SplitDriver::kick);

    for driver in &mut drivers {
        driver.wait(10);
        assert_eq!(driver.bytes(DATA + 0x4000 * driver.index as u64, 20480)[..0x4000], pattern(5, 0x4000));
    }
    assert_eq!(rig.disk.most_in_flight(), 3);
    assert_eq!(rig.engine.statistics().reads, 40);
}

#[test]
fn a_flush_reaches_only_a_disk_with_a_volatile_cache() {
    for volatile_cache in [true, false] {
        let mut options = DiskOptions::default();
        options.geometry.volatile_cache = volatile_cache;
        let rig = Rig::new(options);
        let mut driver = rig.driver(0, RingOptions::default());

        let flush = driver.send(FLUSH, 0, &[]);

        assert_eq!(driver.wait(1), [(u32::from(flush.head), 1)]);
        assert_eq!(driver.status(flush), 0);
        assert_eq!(rig.engine.statistics().flushes, u64::from(volatile_cache));
    }
}

#[test]
fn the_serial_number_is_padded_with_zeros() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    driver.fill(DATA, &[0xaa; 32]);

    let sent = driver.send(GET_ID, 0, &[(DATA, 20)]);

    assert_eq!(driver.wait(1), [(u32::from(sent.head), 21)]);
    assert_eq!(driver.status(sent), 0);
    let expected = *b"SERIAL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xaa\xaa";
    assert_eq!(driver.bytes(DATA, 22), expected);
}

#[test]
fn descriptor_boundaries_carry_no_meaning() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.write(512, &pattern(2, 512));
    let header = driver.header(IN, 1);

    // First: the header in three buffers with an empty one between them. Second: data and status in one buffer.
    let head = driver.link(&[
        (header, 3, 0),
        (DATA, 0, 0),
        (header + 3, 9, 0),
        (header + 12, 4, 0),
        (DATA, 512, WRITE),
        (DATA + 512, 0, WRITE),
        (header + 16, 1, WRITE),
    ]);
    driver.offer(head);
    let joined = driver.header(IN, 1);
    let other = driver.link(&[(joined, 16, 0), (DATA + 0x1000, 513, WRITE)]);
    driver.offer(other);
    driver.kick();

    assert_eq!(driver.wait(2), [(u32::from(head), 513), (u32::from(other), 513)]);
    assert_eq!(driver.bytes(DATA, 512), pattern(2, 512));
    assert_eq!(driver.bytes(DATA + 0x1000, 512), pattern(2, 512));
    assert_eq!(driver.bytes(DATA + 0x1200, 1), [0]);
}

#[test]
fn an_indirect_table_may_be_longer_than_the_ring() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions { size: 16, ..RingOptions::default() });
    rig.disk.write(0, &pattern(4, 30 * 512));
    let header = driver.header(IN, 0);
    let table = DATA + 0x1_0000;

    driver.write_desc(table, 0, Desc { addr: header, len: 16, flags: NEXT, next: 1 });
    for n in 0..30 {
        let addr = DATA + 1024 * u64::from(n);
        driver.write_desc(table, n + 1, Desc { addr, len: 512, flags: NEXT | WRITE, next: n + 2 });
    }
    driver.write_desc(table, 31, Desc { addr: header + 16, len: 1, flags: WRITE, next: 0 });
    let head = driver.raw(Desc { addr: table, len: 32 * 16, flags: INDIRECT, next: 0 });
    driver.offer(head);
    driver.kick();

    assert_eq!(driver.wait(1), [(u32::from(head), 30 * 512 + 1)]);
    assert_eq!(driver.bytes(DATA + 1024 * 29, 512), pattern(4, 30 * 512)[29 * 512..]);
}

#[test]
fn indices_wrap_around_sixteen_bits() {
    let rig = Rig::new(DiskOptions::default());
    for event_idx in [false, true] {
        let index = usize::from(event_idx);
        let mut driver = rig.driver(index, RingOptions { size: 8, base: 0xfffd, event_idx });

        for n in 0..20 {
            let sent = driver.send(IN, n, &[(DATA, 512)]);
            assert_eq!(driver.wait(1), [(u32::from(sent.head), 513)]);
        }

        assert_eq!(rig.engine.stop_ring(index).unwrap(), Some(0xfffd_u16.wrapping_add(20).into()));
    }
}
