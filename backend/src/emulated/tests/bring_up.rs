//! Registers, admin commands, reset.

use super::host::{CC, CC_ON, CSTS, Host, Sqe, small, threaded};
use crate::addr::Iova;
use crate::emulated::Options;

#[test]
fn a_controller_can_be_enabled_and_disabled() {
    for options in [small(), threaded()] {
        let mut host = Host::disabled(options);
        host.function.set_bus_master(true).unwrap();
        assert_eq!(host.bar.read32(CSTS), 0);

        host.enable();
        host.bar.write32(CC, CC_ON & !1);

        host.wait_csts(|csts| csts == 0);
    }
}

#[test]
fn identify_matches_the_options() {
    for (lba, shift) in [(512, 9), (4096, 12)] {
        let options = Options { lba, size: 8 << 20, mdts: 3, serial: "S1".into(), ..small() };
        let mut host = Host::enabled(options);
        let page = host.buffer(4096);
        let at = page.span().start();

        let controller = host.admin(Sqe::new(6).dword(10, 1).prps(at, Iova(0)));
        let mut serial = [0; 20];
        page.memory().copy_to(4, &mut serial);
        let (mdts, namespaces) = (page.memory().read_u8(77), page.memory().read_u32(516));
        let namespace = host.admin(Sqe::new(6).nsid(1).prps(at, Iova(0)));

        assert_eq!((controller.status, namespace.status), (0, 0));
        assert_eq!(&serial, b"S1                  ");
        assert_eq!((mdts, namespaces), (3, 1));
        assert_eq!(page.memory().read_u64(0), (8 << 20) / u64::from(lba));
        assert_eq!(page.memory().read_u32(128) >> 16 & 0xff, shift);
    }
}

#[test]
fn identify_of_an_inactive_namespace_is_zero_and_of_an_invalid_one_an_error() {
    let mut host = Host::enabled(small());
    let page = host.buffer(4096);
    let at = page.span().start();
    page.memory().write_u64(0, 7);

    let unknown = host.admin(Sqe::new(6).nsid(2).prps(at, Iova(0)));
    let broadcast = host.admin(Sqe::new(6).nsid(u32::MAX).prps(at, Iova(0)));

    assert_eq!((unknown.status, page.memory().read_u64(0)), (0, 0));
    assert_eq!(broadcast.status, 0x00b);
}

#[test]
fn number_of_queues_is_limited_by_the_option() {
    let mut host = Host::enabled(Options { queues: 3, ..small() });

    let less = host.admin(Sqe::new(9).dword(10, 7).dword(11, 1 << 16 | 1));
    let more = host.admin(Sqe::new(9).dword(10, 7).dword(11, 9 << 16 | 9));
    let none = host.admin(Sqe::new(9).dword(10, 7).dword(11, 0xffff));
    let now = host.admin(Sqe::new(10).dword(10, 7));

    assert_eq!((less.status, less.result), (0, 0x0001_0001));
    assert_eq!((more.status, more.result), (0, 0x0002_0002));
    assert_eq!(none.status, 0x002);
    assert_eq!(now.result, 0x0002_0002);
}

#[test]
fn invalid_queue_commands_fail_with_the_specified_status() {
    let mut host = Host::enabled(Options { queues: 2, queue_entries: 64, ..small() });
    let memory = host.buffer(4096);
    let at = memory.span().start();
    let cq = |dw10: u32, dw11: u32| Sqe::new(5).prps(at, Iova(0)).dword(10, dw10).dword(11, dw11);
    let sq = |dw10: u32, dw11: u32| Sqe::new(1).prps(at, Iova(0)).dword(10, dw10).dword(11, dw11);
    let cases = [
        ("cq 0", cq(15 << 16, 1), 0x101),
        ("cq id too large", cq(15 << 16 | 3, 1), 0x101),
        ("one entry", cq(1, 1), 0x102),
        ("too many entries", cq(64 << 16 | 1, 1), 0x102),
        ("not contiguous", cq(15 << 16 | 1, 0), 0x002),
        ("vector too large", cq(15 << 16 | 1, 3 << 16 | 3), 0x108),
        ("sq without its cq", sq(15 << 16 | 1, 1 << 16 | 1), 0x100),
        ("sq on the admin cq", sq(15 << 16 | 1, 1), 0x101),
        ("a valid cq", cq(15 << 16 | 1, 1), 0),
        ("an existing cq", cq(15 << 16 | 1, 1), 0x101),
        ("a valid sq", sq(15 << 16 | 1, 1 << 16 | 1), 0),
        ("queue count while queues exist", Sqe::new(9).dword(10, 7).dword(11, 0), 0x00c),
        ("delete a cq in use", Sqe::new(4).dword(10, 1), 0x10c),
        ("delete a missing sq", Sqe::new(0).dword(10, 2), 0x101),
        ("delete the sq", Sqe::new(0).dword(10, 1), 0),
        ("delete the cq", Sqe::new(4).dword(10, 1), 0),
        ("unknown opcode", Sqe::new(0x7f), 0x001),
    ];

    for (case, sqe, status) in cases {
        assert_eq!(host.admin(sqe).status, status, "{case}");
    }
}

#[test]
fn an_invalid_admin_queue_is_a_fatal_status() {
    let host = Host::disabled(small());
    host.bar.write32(0x24, 0);
    host.bar.write32(CC, CC_ON);
    assert_eq!(host.bar.read32(CSTS), 0b10);
}

#[test]
fn unmapped_queue_memory_is_a_fault_and_a_fatal_status() {
    let mut host = Host::enabled(small());
    let sq = host.admin.sq.span();
    host.admin = super::host::Pair::new(&*host.space, 0, [2; 2]);

    host.bar.write32(host.doorbell(0), 1);

    assert_eq!(host.bar.read32(CSTS) & 0b10, 0b10);
    assert_eq!(host.machine.iommu().faults()[0].iova, sq.start());
}

#[test]
fn without_bus_master_commands_wait() {
    let mut host = Host::enabled(small());
    host.function.set_bus_master(false).unwrap();
    let sqe = Sqe::new(10).dword(10, 7);
    let mut admin = std::mem::replace(&mut host.admin, super::host::Pair::new(&*host.space, 0, [2; 2]));

    host.push(&mut admin, sqe);
    host.ring(&admin);
    let before = admin.peek();
    host.function.set_bus_master(true).unwrap();

    assert_eq!(before, None);
    assert_eq!(host.take(&mut admin).unwrap().status, 0);
}

#[test]
fn a_reset_deletes_queues_and_clears_bus_master() {
    for options in [small(), threaded()] {
        let mut host = Host::enabled(options);
        let pair = host.pair(1, [8; 2]);
        host.function.reset().unwrap();
        let mut command = [0; 2];
        host.function.config_read(4, &mut command).unwrap();

        assert_eq!(u16::from_le_bytes(command) & 0b100, 0);
        assert_eq!((host.bar.read32(CC), host.bar.read32(CSTS), host.bar.read32(0x24)), (0, 0, 0));
        host.function.set_bus_master(true).unwrap();
        host.enable();
        assert!(pair.peek().is_none());
        assert_eq!(host.admin(Sqe::new(0).dword(10, 1)).status, 0x101, "queue 1 is gone");
    }
}

#[test]
fn shutdown_completes_and_stops_commands() {
    for options in [small(), threaded()] {
        let host = Host::enabled(options);
        host.bar.write32(CC, CC_ON | 1 << 14);
        host.wait_csts(|csts| csts >> 2 & 0b11 == 0b10);
        host.bar.write32(host.doorbell(0), 1);
        assert!(host.admin.peek().is_none());
    }
}

#[test]
fn enable_no_snoop_is_hardwired_and_a_function_level_reset_works() {
    let mut host = Host::enabled(small());
    let control = 0x58;
    host.function.config_write(control, &0x0800_u16.to_le_bytes()).unwrap();
    let mut bytes = [0; 2];
    host.function.config_read(control, &mut bytes).unwrap();
    assert_eq!(u16::from_le_bytes(bytes), 0);

    host.function.config_write(control, &0x8000_u16.to_le_bytes()).unwrap();

    assert_eq!(host.bar.read32(CSTS), 0);
    host.function.set_bus_master(true).unwrap();
    host.enable();
}

#[test]
fn registers_read_as_all_ones_while_memory_decoding_is_off() {
    let host = Host::enabled(small());
    host.function.config_write(4, &[0, 0]).unwrap();
    assert_eq!(host.bar.read32(CSTS), u32::MAX);
}

#[test]
fn an_invalid_option_is_named_in_the_error() {
    let refused = [
        (Options { lba: 1024, ..small() }, "lba"),
        (Options { size: 1000, ..small() }, "size"),
        (Options { queues: 0, ..small() }, "queues"),
        (Options { serial: "x".repeat(21), ..small() }, "serial"),
    ];
    for (options, name) in refused {
        let error = crate::emulated::Machine::new(options).err().expect("refused").to_string();
        assert!(error.starts_with(&format!("emulated function: {name}")), "{error}");
    }
}
