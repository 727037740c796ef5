//! Log pages and asynchronous events.

use super::host::{Completion, Host, Sqe, small, threaded};
use crate::addr::Iova;
use crate::hardware::DmaBuffer;

/// Get Log Page of `dwords` into `page`.
fn log(page: &DmaBuffer, id: u32, dwords: u32) -> Sqe {
    Sqe::new(2).nsid(u32::MAX).dword(10, (dwords - 1) << 16 | id).prps(page.span().start(), Iova(0))
}

fn wait(host: &mut Host) -> Completion {
    let mut admin = std::mem::replace(&mut host.admin, super::host::Pair::new(&*host.space, 0, [2; 2]));
    let done = loop {
        if let Some(done) = host.take(&mut admin) {
            break done;
        }
        std::thread::yield_now();
    };
    host.admin = admin;
    done
}

fn submit(host: &mut Host, sqe: Sqe) -> u16 {
    let mut admin = std::mem::replace(&mut host.admin, super::host::Pair::new(&*host.space, 0, [2; 2]));
    let cid = host.push(&mut admin, sqe);
    host.ring(&admin);
    host.admin = admin;
    cid
}

#[test]
fn the_error_log_lists_failed_commands_newest_first() {
    let mut host = Host::enabled(small());
    let mut pair = host.pair(1, [8; 2]);
    let page = host.buffer(4096);
    host.run(&mut pair, Sqe::rw(2, 5000, 1));
    host.run(&mut pair, Sqe::new(0x55).nsid(1));

    let done = host.admin(log(&page, 1, 32));

    let shared = page.memory();
    assert_eq!(done.status, 0);
    assert_eq!((shared.read_u64(0), shared.read_u16(8), shared.read_u16(10)), (2, 1, 1));
    assert_eq!(shared.read_u16(12) >> 1 & 0x7ff, 0x001);
    assert_eq!((shared.read_u64(64), shared.read_u16(76) >> 1 & 0x7ff, shared.read_u64(80)), (1, 0x080, 5000));
}

#[test]
fn a_resize_is_reported_once_until_the_changed_namespace_list_is_read() {
    let mut host = Host::enabled(small());
    let page = host.buffer(4096);
    host.machine.resize(1 << 19).unwrap();
    let first = submit(&mut host, Sqe::new(12));
    host.admin(Sqe::new(9).dword(10, 11).dword(11, 1 << 8));

    host.machine.resize(1 << 20).unwrap();
    host.machine.resize(1 << 18).unwrap();

    let done = wait(&mut host);
    assert_eq!((done.cid, done.status, done.result), (first, 0, 0x04_00_02), "not before notices are enabled");
    let second = submit(&mut host, Sqe::new(12));
    assert_eq!(host.admin(log(&page, 4, 1024)).status, 0);
    assert_eq!((page.memory().read_u32(0), page.memory().read_u32(4)), (1, 0));
    assert_eq!(host.admin(log(&page, 4, 1024)).status, 0);
    assert_eq!(page.memory().read_u32(0), 0, "reading the list clears it");
    host.machine.resize(1 << 20).unwrap();
    assert_eq!(wait(&mut host).cid, second);
}

#[test]
fn an_invalid_resize_of_a_memory_disk_is_refused() {
    let host = Host::enabled(small());
    for size in [0, 1000, 1 << 40] {
        assert!(host.machine.resize(size).is_err(), "{size}");
    }
}

#[test]
fn smart_counts_commands_and_data() {
    let mut host = Host::enabled(small());
    let mut pair = host.pair(1, [8; 2]);
    let page = host.buffer(4096);
    for _ in 0..3 {
        host.run(&mut pair, Sqe::rw(2, 0, 1).prps(page.span().start(), Iova(0)));
    }

    let done = host.admin(log(&page, 2, 128));
    let mut beyond = log(&page, 2, 4);
    beyond = beyond.dword(12, 516);

    assert_eq!((done.status, page.memory().read_u64(64), page.memory().read_u64(32)), (0, 3, 1));
    assert_eq!(host.admin(beyond).status, 0x002);
    assert_eq!(host.admin(log(&page, 0x77, 1)).status, 0x109);
    assert_eq!(host.admin(log(&page, 2, 0x1_0000)).status, 0x002, "more than MDTS");
}

#[test]
fn a_bad_doorbell_is_reported_once_until_the_error_log_is_read() {
    for options in [small(), threaded()] {
        let mut host = Host::enabled(options);
        let page = host.buffer(4096);
        let first = submit(&mut host, Sqe::new(12));
        let second = submit(&mut host, Sqe::new(12));

        host.bar.write32(host.doorbell(8), 1);
        let event = wait(&mut host);
        host.bar.write32(host.doorbell(8), 1);
        let log_read = host.admin(log(&page, 1, 16));
        host.bar.write32(host.doorbell(8), 1);
        let again = wait(&mut host);

        assert_eq!((event.cid, event.status, event.result), (first, 0, 0x01_00_00));
        assert_eq!(log_read.status, 0);
        assert_eq!((again.cid, again.result), (second, 0x01_00_00));
    }
}

#[test]
fn an_event_without_a_request_is_reported_to_the_next_one() {
    let mut host = Host::enabled(small());
    host.bar.write32(host.doorbell(8), 1);
    let cid = submit(&mut host, Sqe::new(12));
    let event = wait(&mut host);
    assert_eq!((event.cid, event.result), (cid, 0x01_00_00));
}

#[test]
fn event_requests_are_limited_and_can_be_aborted() {
    let mut host = Host::enabled(small());
    let waiting: Vec<_> = (0..4).map(|_| submit(&mut host, Sqe::new(12))).collect();

    let fifth = host.admin(Sqe::new(12));
    let abort = submit(&mut host, Sqe::new(8).dword(10, u32::from(waiting[2]) << 16));
    let (aborted, abort_done) = (wait(&mut host), wait(&mut host));

    assert_eq!(fifth.status, 0x105);
    assert_eq!((aborted.cid, aborted.status), (waiting[2], 0x007));
    assert_eq!((abort_done.cid, abort_done.result & 1), (abort, 0));
}
