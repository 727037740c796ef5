//! Initialization, shutdown and recovery.

use std::sync::atomic::Ordering::SeqCst;

use super::rig::{Rig, collect, nvme_options, run, small, span};
use crate::driver::nvme::{NvmeErrorKind, NvmeOptions};
use crate::driver::{Command, Driver, Outcome};
use crate::emulated::{Commands, Effect, Fault, Mode, Options, Status};

const ONE_BLOCK: Command = Command::Read { block: 0, count: 1 };

#[test]
fn a_shutdown_notifies_the_controller_and_ends_dma() {
    let rig = Rig::new(small());
    let (mut nvme, mut queues) = rig.up(3);
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
    let commands = rig.machine.traffic().admin;
    drop(queues);

    nvme.shut_down();

    rig.assert_stopped();
    assert_eq!(rig.machine.traffic().admin - commands, 6, "three queue pairs are deleted");
    let on = 1 | 6 << 16 | 4 << 20;
    let configurations = rig.function.faults.configurations.lock().unwrap().clone();
    assert_eq!(configurations, [on - 1, on, on | 1 << 14, on - 1], "set, enabled, shut down normally, disabled");
    nvme.shut_down();
    rig.assert_stopped();
}

#[test]
fn dropping_the_driver_ends_dma() {
    let rig = Rig::new(Options { mode: Mode::Threaded, ..small() });
    let (nvme, mut queues) = rig.up(1);
    for tag in 0..32 {
        queues[0].submit(ONE_BLOCK, &[span(0, 512)], 0, 512, tag).unwrap();
    }
    queues[0].ring();

    drop(nvme);

    rig.assert_stopped();
}

#[test]
fn a_controller_can_be_brought_up_after_a_shutdown() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    nvme.shut_down();

    let (_nvme, mut queues) = rig.up(1);

    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_controller_left_enabled_by_a_former_owner_is_brought_up() {
    let rig = Rig::new(small());
    let former = rig.up(2);
    std::mem::forget(former);

    let (mut nvme, mut queues) = rig.up(1);

    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
    drop(queues);
    nvme.shut_down();
    assert!(!rig.bus_master_is_on());
}

#[test]
fn recovery_returns_as_many_new_queues_and_keeps_the_data() {
    let rig = Rig::new(small());
    let (mut nvme, mut queues) = rig.up(3);
    rig.guest.write_u64(0, 0x1122_3344);
    assert_eq!(run(&mut *queues[1], Command::Write { block: 9, count: 1 }, &[span(0, 512)], 512), Outcome::Success);
    for tag in 0..5 {
        queues[0].submit(ONE_BLOCK, &[span(0, 512)], 0, 512, tag).unwrap();
    }
    drop(queues);
    let mapped = rig.driver_memory();

    let mut queues = nvme.recover().unwrap();

    assert_eq!((queues.len(), rig.driver_memory()), (3, mapped));
    for queue in &mut queues {
        assert_eq!(queue.in_flight(), 0);
        rig.guest.write_u64(4096, 0);
        let read = Command::Read { block: 9, count: 1 };
        assert_eq!(run(&mut **queue, read, &[span(4096, 512)], 512), Outcome::Success);
        assert_eq!(rig.guest.read_u64(4096), 0x1122_3344);
    }
    assert_eq!(rig.machine.iommu().faults(), []);
}

#[test]
fn recovery_can_be_repeated_under_load() {
    let rig = Rig::new(Options { mode: Mode::Threaded, ..small() });
    let (mut nvme, mut queues) = rig.up(2);
    for _ in 0..20 {
        for queue in &mut queues {
            for tag in 0..100 {
                queue.submit(ONE_BLOCK, &[span(0, 512)], 0, 512, tag).unwrap();
            }
            queue.ring();
        }
        drop(queues);
        queues = nvme.recover().unwrap();
    }
    assert_eq!(collect(&mut *queues[0], 0), []);
    drop(queues);
    nvme.shut_down();
    rig.assert_stopped();
}

#[test]
fn recovery_with_fewer_queues_fails() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(3);
    drop(queues);
    rig.function.faults.fewer_vectors.store(true, SeqCst);

    let error = nvme.recover().err().unwrap();

    assert_eq!(error.to_string(), "0000:00:04.0: is no longer what it was: 1 queues instead of 3");
    rig.assert_stopped();
}

#[test]
fn recovery_does_not_replace_the_disk_by_another() {
    // Identify Controller: the serial number. Identify Namespace: LBADS of the first format, NGUID, EUI64.
    let cases: [(u8, usize, &[u8], &str); 4] = [
        (1, 4, b"OTHER     ", "serial OTHER instead of EMULATED-0"),
        (0, 130, &[12], "namespace 1 has blocks of 4096 instead of 512"),
        (0, 104, &[1], "namespace 1 is another one (NGUID, EUI64)"),
        (0, 127, &[7], "namespace 1 is another one (NGUID, EUI64)"),
    ];
    for (cns, offset, bytes, change) in cases {
        let rig = Rig::new(small());
        let (mut nvme, queues) = rig.up(1);
        drop(queues);
        rig.machine.inject(Fault::Identify { cns, offset, bytes: bytes.to_vec() });

        let error = nvme.recover().err().unwrap();

        assert_eq!(error.to_string(), format!("0000:00:04.0: is no longer what it was: {change}"));
        rig.assert_stopped();
        rig.machine.clear_faults();
        assert!(nvme.recover().is_ok(), "the original disk is served again");
    }
}

#[test]
fn a_disk_that_shrinks_is_the_same_disk() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.machine.inject(Fault::Identify { cns: 0, offset: 0, bytes: 5_u64.to_le_bytes().to_vec() });

    assert!(nvme.recover().is_ok());

    assert_eq!(nvme.geometry().blocks, 5);
}

#[test]
fn queues_can_be_taken_only_once() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    assert_eq!(queues.len(), 2);
    assert!(nvme.take_queues().is_empty());
}

#[test]
fn the_number_of_queues_is_limited_by_request_vectors_and_grant() {
    let count = |rig: &Rig, requested| rig.up(requested).1.len();
    assert_eq!(count(&Rig::new(Options { queues: 4, ..small() }), 3), 3, "as requested");
    assert_eq!(count(&Rig::new(Options { queues: 4, ..small() }), 9), 4, "as the controller grants");
    assert_eq!(count(&Rig::new(Options { queues: 4, vectors: Some(3), ..small() }), 9), 2, "fewer vectors");
    assert_eq!(count(&Rig::new(Options { queues: 2, vectors: Some(3), ..small() }), 0), 1, "at least one");
}

#[test]
fn the_read_only_option_makes_the_disk_read_only() {
    let rig = Rig::new(small());
    let nvme = rig.bring_up(NvmeOptions { read_only: true, ..nvme_options(1) }).unwrap();
    assert!(nvme.geometry().read_only);
}

#[test]
fn a_missing_namespace_is_reported_with_the_active_ones() {
    let rig = Rig::new(small());

    let error = rig.bring_up(NvmeOptions { namespaces: vec![7], ..nvme_options(1) }).err().unwrap();

    assert_eq!(error.to_string(), "0000:00:04.0: has no active namespace 7; it has: 1");
    assert!(matches!(error.kind, NvmeErrorKind::NamespaceNotFound { wanted: 7, .. }));
    rig.assert_stopped();
    assert!(rig.bring_up(NvmeOptions { namespaces: vec![1], ..nvme_options(1) }).is_ok());
}

#[test]
fn another_kind_of_function_is_refused_by_its_class() {
    let rig = Rig::with_function(small(), |function| function.class = Some([0x00, 0x00, 0x02]));

    let error = rig.bring_up(nvme_options(1)).err().unwrap().to_string();

    assert!(
        error.starts_with("0000:00:04.0: is not an NVMe controller but a network controller (PCI class code 020000")
    );
    rig.assert_stopped();
}

#[test]
fn recovery_restores_the_write_cache_setting_or_fails() {
    const SET_FEATURES: u8 = 9;
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    nvme.set_write_cache(false).unwrap();
    drop(queues);
    drop(nvme.recover().unwrap());

    // Set Features commands, in order: Number of Queues, Asynchronous Event Configuration, Volatile Write Cache.
    let refusal = Effect::Status(Status::INVALID_FIELD);
    rig.machine.inject(Fault::Command { on: Commands::admin(SET_FEATURES), skip: 2, times: 1, effect: refusal });
    let error = nvme.recover().err().unwrap().to_string();

    assert!(error.contains("Set Features (Volatile Write Cache) failed"), "{error}");
    rig.assert_stopped();
    assert!(nvme.set_write_cache(true).is_err(), "a stopped controller cannot change its cache");
}
