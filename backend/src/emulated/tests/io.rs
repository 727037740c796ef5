//! Reads and writes, PRPs, the IOMMU, interrupts.

use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};

use super::host::{Host, Pair, Sqe, small, threaded};
use crate::addr::{Address, Iova, Span};
use crate::emulated::{Access, Medium, Options};
use crate::hardware::DmaBuffer;
use crate::hardware::InterruptKind;

fn pattern(buffer: &DmaBuffer, seed: u8) -> Vec<u8> {
    let bytes: Vec<u8> = (0..buffer.memory().len()).map(|i| (i / 509) as u8 ^ (i as u8).wrapping_add(seed)).collect();
    buffer.memory().copy_from(0, &bytes);
    bytes
}

fn contents(buffer: &DmaBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.memory().len()];
    buffer.memory().copy_to(0, &mut bytes);
    bytes
}

fn page(buffer: &DmaBuffer, n: u64) -> Iova {
    Iova(buffer.span().start().raw() + n * 4096)
}

/// A PRP list with `entries` at `offset` of a new page.
fn list(host: &Host, offset: usize, entries: &[Iova]) -> DmaBuffer {
    let list = host.buffer(4096);
    for (i, entry) in entries.iter().enumerate() {
        list.memory().write_u64(offset + i * 8, entry.raw());
    }
    list
}

fn pair(options: Options) -> (Host, Pair) {
    let mut host = Host::enabled(options);
    let pair = host.pair(1, [16; 2]);
    (host, pair)
}

#[test]
fn written_data_is_read_back() {
    let directory = std::env::temp_dir();
    let path = directory.join(format!("emulated-{}", std::process::id()));
    let file = Medium::File { path: path.clone(), create: true, sparse: true };
    for options in [small(), threaded(), Options { lba: 4096, ..small() }, Options { medium: file, ..small() }] {
        let blocks = 8192 / options.lba;
        let (host, mut pair) = pair(options);
        let (from, to) = (host.buffer(8192), host.buffer(8192));
        let written = pattern(&from, 3);

        let write = host.run(&mut pair, Sqe::rw(1, 5, blocks).prps(page(&from, 0), page(&from, 1)));
        let read = host.run(&mut pair, Sqe::rw(2, 5, blocks).prps(page(&to, 0), page(&to, 1)));
        let flush = host.run(&mut pair, Sqe::new(0).nsid(1));

        assert_eq!((write.status, read.status, flush.status), (0, 0, 0));
        assert_eq!(contents(&to), written);
        assert_eq!(host.machine.iommu().faults(), []);
        assert_eq!(host.machine.traffic().bytes_written, 8192);
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_file_keeps_its_data_and_is_locked_while_in_use() {
    let path = std::env::temp_dir().join(format!("emulated-survives-{}", std::process::id()));
    let options =
        |size, create| Options { size, medium: Medium::File { path: path.clone(), create, sparse: false }, ..small() };
    let missing = crate::emulated::Machine::new(options(0, false)).err().map(|error| error.to_string());
    {
        let (host, mut pair) = pair(options(1 << 20, true));
        let from = host.buffer(4096);
        pattern(&from, 9);
        host.run(&mut pair, Sqe::rw(1, 7, 8).prps(page(&from, 0), Iova(0)));
        assert!(crate::emulated::Machine::new(options(0, false)).is_err(), "locked by the first");
    }
    assert!(crate::emulated::Machine::new(options(2 << 20, true)).is_err(), "another size");

    let (host, mut pair) = pair(options(0, false));
    let to = host.buffer(4096);
    host.run(&mut pair, Sqe::rw(2, 7, 8).prps(page(&to, 0), Iova(0)));

    assert!(missing.unwrap().contains("No such file"));
    let expected = host.buffer(4096);
    assert_eq!(contents(&to), pattern(&expected, 9));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn the_phase_flips_each_time_the_queue_wraps() {
    for options in [small(), threaded()] {
        let (host, mut pair) = pair(options);
        let data = host.buffer(4096);
        for round in 0..50 {
            let done = host.run(&mut pair, Sqe::rw(2, round, 1).prps(page(&data, 0), Iova(0)));
            assert_eq!((done.status, done.sq), (0, 1));
            assert_eq!(u64::from(done.sq_head), (round + 1) % 16);
        }
        assert_eq!(host.machine.traffic().bad_doorbells, 0);
    }
}

#[test]
fn prp_lists_may_start_inside_a_page_and_continue_on_another() {
    let (host, mut pair) = pair(Options { mdts: 0, size: 8 << 20, ..small() });
    let data = host.buffer(520 * 4096);
    let bytes = pattern(&data, 1);
    let other: Vec<_> = (1..520).map(|n| page(&data, n)).collect();
    // The first page of the list has space for three entries: two data pages and the pointer to the next list.
    let last = list(&host, 0, &other[2 + 511..]);
    let second: Vec<_> = other[2..2 + 511].iter().copied().chain([page(&last, 0)]).collect();
    let second = list(&host, 0, &second);
    let first = list(&host, 4096 - 24, &[other[0], other[1], page(&second, 0)]);
    let start = Iova(first.span().start().raw() + 4096 - 24);

    let write = host.run(&mut pair, Sqe::rw(1, 0, 520 * 8).prps(page(&data, 0), start));
    data.memory().clear();
    let read = host.run(&mut pair, Sqe::rw(2, 0, 520 * 8).prps(page(&data, 0), start));

    assert_eq!((write.status, read.status), (0, 0));
    assert_eq!(contents(&data), bytes);
}

#[test]
fn a_prp_list_that_ends_at_its_page_end_has_data_in_the_last_entry() {
    let (host, mut pair) = pair(Options { mdts: 0, ..small() });
    let data = host.buffer(3 * 4096);
    let bytes = pattern(&data, 1);
    let first = list(&host, 4096 - 16, &[page(&data, 1), page(&data, 2)]);
    let start = Iova(first.span().start().raw() + 4096 - 16);

    host.run(&mut pair, Sqe::rw(1, 0, 24).prps(page(&data, 0), start));
    data.memory().clear();
    let read = host.run(&mut pair, Sqe::rw(2, 0, 24).prps(page(&data, 0), start));

    assert_eq!((read.status, contents(&data)), (0, bytes));
}

#[test]
fn invalid_commands_fail_with_the_specified_status() {
    let (host, mut pair) = pair(Options { mdts: 1, ..small() });
    let data = host.buffer(16384);
    let at = page(&data, 0);
    let odd = |add: u64| Iova(at.raw() + add);
    let mut sgl = Sqe::rw(2, 0, 1).prps(at, Iova(0));
    sgl.0[1] = 1 << 6;
    let cases = [
        ("one past the end", Sqe::rw(2, 2047, 2).prps(at, Iova(0)), 0x080),
        ("far past the end", Sqe::rw(1, u64::MAX, 1).prps(at, Iova(0)), 0x080),
        ("the last block", Sqe::rw(2, 2047, 1).prps(at, Iova(0)), 0),
        ("invalid namespace", Sqe::rw(2, 0, 1).nsid(2).prps(at, Iova(0)), 0x00b),
        ("flush of an invalid namespace", Sqe::new(0).nsid(2), 0x00b),
        ("flush of all namespaces", Sqe::new(0).nsid(u32::MAX), 0),
        ("more than MDTS", Sqe::rw(2, 0, 17).prps(at, Iova(0)), 0x002),
        ("an SGL", sgl, 0x002),
        ("odd first page", Sqe::rw(2, 0, 1).prps(odd(2), Iova(0)), 0x013),
        ("second page with an offset", Sqe::rw(2, 0, 16).prps(at, odd(4096 + 512)), 0x013),
        ("first page with an offset", Sqe::rw(2, 0, 8).prps(odd(512), page(&data, 1)), 0),
        ("unknown opcode", Sqe::new(0x55).nsid(1), 0x001),
    ];

    for (case, sqe, status) in cases {
        assert_eq!(host.run(&mut pair, sqe).status, status, "{case}");
    }
    assert_eq!(host.machine.iommu().faults(), []);
}

#[test]
fn a_transfer_to_unmapped_memory_fails_only_its_command() {
    let (host, mut pair) = pair(small());
    let data = host.buffer(4096);
    let unmapped = host.buffer(4096).span().start();

    let read = host.run(&mut pair, Sqe::rw(2, 0, 16).prps(page(&data, 0), unmapped));
    let write = host.run(&mut pair, Sqe::rw(1, 0, 1).prps(Iova(0x1234_5000), Iova(0)));
    let after = host.run(&mut pair, Sqe::rw(2, 0, 8).prps(page(&data, 0), Iova(0)));

    assert_eq!((read.status, write.status, after.status), (0x004, 0x004, 0));
    let faults: Vec<_> = host.machine.iommu().faults().iter().map(|fault| (fault.iova, fault.access)).collect();
    assert_eq!(faults, [(unmapped, Access::Write), (Iova(0x1234_5000), Access::Read)]);
}

#[test]
fn a_null_medium_still_checks_addresses() {
    let (host, mut pair) = pair(Options { medium: Medium::Null, size: 1 << 40, ..small() });
    let data = host.buffer(4096);
    let good = host.run(&mut pair, Sqe::rw(2, 1 << 30, 8).prps(page(&data, 0), Iova(0)));
    let bad = host.run(&mut pair, Sqe::rw(2, 1 << 30, 8).prps(Iova(0), Iova(0)));
    assert_eq!((good.status, bad.status), (0, 0x004));
}

#[test]
fn a_full_completion_queue_stops_commands_until_the_host_makes_room() {
    for options in [small(), threaded()] {
        let mut host = Host::enabled(options);
        let mut pair = host.pair(1, [16, 4]);
        let data = host.buffer(4096);
        let mut order = Vec::new();
        for _ in 0..10 {
            host.push(&mut pair, Sqe::rw(2, 0, 1).prps(page(&data, 0), Iova(0)));
        }
        host.ring(&pair);
        while order.len() < 10 {
            order.extend(host.take(&mut pair).map(|done| done.cid));
            std::thread::yield_now();
        }
        assert_eq!(order, (0..10).collect::<Vec<_>>());
        assert_eq!(host.machine.traffic().bad_doorbells, 0);
    }
}

#[test]
fn vectors_are_signalled_only_while_routed() {
    let (host, mut pair) = pair(small());
    let event = |flags| eventfd(0, EventfdFlags::CLOEXEC | flags).unwrap();
    let events = [event(EventfdFlags::NONBLOCK), event(EventfdFlags::NONBLOCK)];
    let count = |n: usize| {
        let mut bytes = [0; 8];
        rustix::io::read(&events[n], &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    };
    let data = host.buffer(4096);
    let read = || Sqe::rw(2, 0, 1).prps(page(&data, 0), Iova(0));

    host.function.route_vectors(InterruptKind::MsiX, &[events[0].as_fd(), events[1].as_fd()]).unwrap();
    host.run(&mut pair, read());
    let routed = (count(0), count(1));
    host.function.route_vectors(InterruptKind::MsiX, &[]).unwrap();
    host.run(&mut pair, read());

    assert_eq!(routed, (0, 1));
    assert_eq!((count(0), count(1)), (0, 0));
    let many: Vec<_> = (0..9).map(|_| events[0].as_fd()).collect();
    assert!(host.function.route_vectors(InterruptKind::MsiX, &many).is_err(), "nine for five vectors");
}

#[test]
fn bad_doorbells_are_counted_and_change_nothing() {
    let (host, mut pair) = pair(small());
    let data = host.buffer(4096);

    host.bar.write32(host.doorbell(2), 16); // tail past the end
    host.bar.write32(host.doorbell(4), 1); // queue 2 does not exist
    let after = host.machine.traffic().bad_doorbells;

    assert_eq!(after, 2);
    let done = host.run(&mut pair, Sqe::rw(2, 0, 1).prps(page(&data, 0), Iova(0)));
    assert_eq!(done.status, 0);
}

#[test]
fn write_zeroes_and_deallocated_blocks_read_as_zero() {
    let (host, mut pair) = pair(small());
    let data = host.buffer(8192);
    pattern(&data, 5);
    host.run(&mut pair, Sqe::rw(1, 0, 16).prps(page(&data, 0), page(&data, 1)));
    let ranges = host.buffer(4096);
    ranges.memory().write_u32(4, 2);
    ranges.memory().write_u64(8, 10);

    let zeroes = host.run(&mut pair, Sqe::rw(8, 1, 3));
    let discard = host.run(&mut pair, Sqe::new(9).nsid(1).dword(11, 4).prps(page(&ranges, 0), Iova(0)));
    let expected = contents(&data);
    host.run(&mut pair, Sqe::rw(2, 0, 16).prps(page(&data, 0), page(&data, 1)));

    assert_eq!((zeroes.status, discard.status), (0, 0));
    for (block, bytes) in contents(&data).chunks(512).enumerate() {
        let zero = (1..4).contains(&block) || (10..12).contains(&block);
        assert_eq!(bytes, if zero { &[0; 512][..] } else { &expected[block * 512..][..512] }, "block {block}");
    }
}

#[test]
fn a_doorbell_stride_and_a_narrow_address_space_work() {
    let reserved = vec![Span::new(Iova(0x3f_ffff_0000), 0x10000).unwrap()];
    let options = Options { doorbell_stride: 3, address_width: 39, reserved, ..small() };
    let (host, mut pair) = pair(options);
    let data = host.buffer(4096);

    let done = host.run(&mut pair, Sqe::rw(2, 0, 1).prps(page(&data, 0), Iova(0)));

    assert_eq!(done.status, 0);
    assert!(host.machine.iommu().mapped().iter().all(|span| span.last() < Iova(1 << 39)));
}

/// An SGL descriptor of type `kind` at `at` of `shared`.
fn descriptor(shared: &crate::sys::SharedMemory, at: usize, address: u64, len: usize, kind: u8) {
    shared.write_u64(at, address);
    shared.write_u64(at + 8, len as u64 | u64::from(kind) << 56);
}

/// A read or write of `blocks` blocks whose data pointer is this SGL descriptor.
fn sgl(opcode: u8, blocks: u32, address: Iova, len: u64, kind: u8) -> Sqe {
    let mut sqe = Sqe::rw(opcode, 0, blocks).prps(address, Iova(len | u64::from(kind) << 56));
    sqe.0[1] = 1 << 6;
    sqe
}

#[test]
fn sgls_of_any_alignment_transfer_all_data() {
    let (host, mut pair) = pair(Options { sgl: true, ..small() });
    let data = host.buffer(8192);
    let bytes = pattern(&data, 4);
    let lists = host.buffer(4096);
    let (start, at) = (data.span().start().raw(), lists.span().start().raw());
    // Three data blocks of odd lengths and an empty one, in two segments.
    descriptor(lists.memory(), 16, start + 1, 1001, 0x00);
    descriptor(lists.memory(), 32, at + 256, 48, 0x30);
    descriptor(lists.memory(), 256, start + 5000, 500, 0x00);
    descriptor(lists.memory(), 272, start, 0, 0x00);
    descriptor(lists.memory(), 288, start + 3001, 35, 0x00);

    let write = host.run(&mut pair, sgl(1, 3, Iova(at + 16), 32, 0x20));
    let to = host.buffer(4096);
    let read = host.run(&mut pair, sgl(2, 3, to.span().start(), 1536, 0x00));

    assert_eq!((write.status, read.status), (0, 0));
    let expected = [&bytes[1..1002], &bytes[5000..5500], &bytes[3001..3036]].concat();
    assert_eq!(contents(&to)[..1536], expected);
}

#[test]
fn invalid_sgls_fail_with_the_specified_status() {
    let (host, mut pair) = pair(Options { sgl: true, ..small() });
    let data = host.buffer(4096);
    let lists = host.buffer(4096);
    let (start, at) = (data.span().start().raw(), lists.span().start().raw());
    let page = |offset: u64| Iova(at + offset);
    descriptor(lists.memory(), 0, start, 512, 0x00); // a segment that ends with a data block
    descriptor(lists.memory(), 16, start, 512, 0x00);
    descriptor(lists.memory(), 32, at, 16, 0x30); // a segment in the last segment
    descriptor(lists.memory(), 64, at + 64, 16, 0x20); // a cycle
    descriptor(lists.memory(), 96, start, 512, 0x10); // a bit bucket
    let cases = [
        ("too short", sgl(2, 2, Iova(start), 512, 0x00), 0x00f),
        ("too long", sgl(2, 1, Iova(start), 1024, 0x00), 0x00f),
        ("unknown type", sgl(2, 1, Iova(start), 512, 0x40), 0x011),
        ("offset subtype", sgl(2, 1, Iova(start), 512, 0x01), 0x011),
        ("bit bucket", sgl(2, 1, page(96), 16, 0x30), 0x011),
        ("empty segment", sgl(2, 1, page(0), 0, 0x30), 0x00d),
        ("half a descriptor", sgl(2, 1, page(0), 24, 0x30), 0x00d),
        ("a segment without a next segment", sgl(2, 1, page(0), 16, 0x20), 0x00d),
        ("segment in the last segment", sgl(2, 1, page(32), 16, 0x30), 0x00d),
        ("a cycle", sgl(2, 1, page(64), 16, 0x20), 0x00e),
        ("a valid segment", sgl(2, 1, page(0), 16, 0x30), 0),
        ("unmapped segment", sgl(2, 1, Iova(0x5000), 16, 0x30), 0x004),
    ];

    for (case, sqe, status) in cases {
        assert_eq!(host.run(&mut pair, sqe).status, status, "{case}");
    }
}
