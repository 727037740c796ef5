//! Several namespaces on one medium.

use super::host::{Host, Sqe, small};
use crate::addr::Iova;
use crate::emulated::Options;

fn three() -> Options {
    Options { namespaces: 3, ..small() }
}

#[test]
fn each_namespace_has_blocks_of_its_own() {
    let mut host = Host::enabled(three());
    let mut pair = host.pair(1, [8; 2]);
    let page = host.buffer(4096);
    for id in 1..=3_u8 {
        page.memory().write_u8(0, id);
        let write = Sqe::rw(1, 2047, 1).nsid(id.into()).prps(page.span().start(), Iova(0));
        assert_eq!(host.run(&mut pair, write).status, 0);
    }

    for id in 1..=3_u8 {
        let read = Sqe::rw(2, 2047, 1).nsid(id.into()).prps(page.span().start(), Iova(0));
        assert_eq!(host.run(&mut pair, read).status, 0);
        assert_eq!(page.memory().read_u8(0), id);
    }
    for (nsid, lba, status) in [(0, 0, 0x00b), (4, 0, 0x00b), (1, 2048, 0x080), (3, 2048, 0x080)] {
        let read = Sqe::rw(2, lba, 1).nsid(nsid).prps(page.span().start(), Iova(0));
        assert_eq!(host.run(&mut pair, read).status, status, "namespace {nsid}, block {lba}");
    }
}

#[test]
fn identify_tells_them_apart() {
    let mut host = Host::enabled(three());
    let page = host.buffer(4096);
    let mut identify = |cns: u32, nsid: u32| {
        let status = host.admin(Sqe::new(6).nsid(nsid).dword(10, cns).prps(page.span().start(), Iova(0))).status;
        let word = |at| page.memory().read_u32(at);
        (status, [0, 4, 8, 12].map(word), word(516), page.memory().read_u64(120))
    };

    assert_eq!(identify(2, 0).1, [1, 2, 3, 0], "active namespaces");
    assert_eq!(identify(2, 2).1, [3, 0, 0, 0], "those after 2");
    assert_eq!(identify(1, 0).2, 3, "NN");
    let unique = [1, 2, 3].map(|id| identify(0, id).3.to_le_bytes()[7]);
    assert_eq!(unique, [1, 2, 3], "EUI64");
    assert_eq!((identify(0, 4).0, identify(0, 4).3), (0, 0), "inactive");
    assert_eq!((identify(3, 3).0, identify(3, 4).0), (0, 0x00b), "descriptors");
}

#[test]
fn a_part_of_a_medium_can_shrink_and_grow_back_and_the_list_names_it() {
    let mut host = Host::enabled(three());
    host.admin(Sqe::new(9).dword(10, 11).dword(11, 1 << 8));
    let page = host.buffer(4096);

    assert!(host.machine.resize_namespace(2, 1 << 21).is_err(), "the next namespace is there");
    assert!(host.machine.resize_namespace(4, 1 << 20).is_err());
    host.machine.resize_namespace(3, 1 << 19).unwrap();
    host.machine.resize_namespace(2, 1 << 19).unwrap();
    host.machine.resize_namespace(2, 1 << 20).unwrap();

    let log = Sqe::new(2).nsid(u32::MAX).dword(10, 1023 << 16 | 4).prps(page.span().start(), Iova(0));
    assert_eq!(host.admin(log).status, 0);
    assert_eq!([0, 4, 8].map(|at| page.memory().read_u32(at)), [2, 3, 0]);
}
