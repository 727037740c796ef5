//! Namespaces and controllers that are no disks are refused by name.

use super::rig::{Rig, nvme_options, small};
use crate::driver::{Driver, ZoneGeometry};
use crate::emulated::{Fault, Options, ZoneOptions};

/// CAP of the emulated controller with another CSS.
fn capability(css: u64) -> Fault {
    Fault::Capability(css << 37 | 2 << 24 | 1 << 16 | 1023)
}

fn refusal(rig: &Rig) -> String {
    let error = rig.bring_up(nvme_options(1)).err().unwrap().to_string();
    rig.assert_stopped();
    error
}

#[test]
fn a_namespace_of_another_command_set_is_refused_by_name() {
    for (set, name) in [(1, "a key-value store"), (0x33, "of its vendor's own command set")] {
        let rig = Rig::new(Options { command_set: Some(set), ..small() });

        let error = refusal(&rig);

        assert!(error.contains(&format!("namespace 1 is {name} (CSI {set:02x}h)")), "{error}");
    }
}

#[test]
fn a_namespace_of_the_nvm_command_set_is_served_by_a_controller_with_several() {
    let rig = Rig::new(Options { command_set: Some(0), ..small() });

    let (nvme, _queues) = rig.up(1);

    assert_eq!(nvme.geometry().blocks, 8 << 11);
    let enabled = *rig.function.faults.configurations.lock().unwrap().last().unwrap();
    assert_eq!(enabled >> 4 & 0b111, 0b110, "CC.CSS: all command sets");
}

#[test]
fn a_controller_with_one_command_set_is_not_asked_for_that_of_a_namespace() {
    let rig = Rig::new(small());
    rig.machine.inject(Fault::Identify { cns: 3, offset: 12, bytes: vec![4, 1, 0, 0, 2] });

    let (nvme, _queues) = rig.up(1);

    assert_eq!(nvme.geometry().blocks, 8 << 11);
    let enabled = *rig.function.faults.configurations.lock().unwrap().last().unwrap();
    assert_eq!(enabled >> 4 & 0b111, 0, "CC.CSS: NVM");
}

#[test]
fn an_administrative_controller_is_refused_by_name() {
    let rig = Rig::new(small());
    rig.machine.inject(capability(1 << 7));
    let error = refusal(&rig);
    assert!(error.contains("this controller is an administrative one, without I/O command set"), "{error}");

    rig.machine.clear_faults();
    rig.machine.inject(Fault::Identify { cns: 1, offset: 111, bytes: vec![3] });
    let error = refusal(&rig);
    assert!(error.contains("controller type is 3 (an administrative controller)"), "{error}");

    let rig = Rig::with_function(small(), |function| function.class = Some([0x03, 0x08, 0x01]));
    let error = refusal(&rig);
    assert!(error.contains("is not an NVMe controller but an NVMe administrative controller"), "{error}");
}

#[test]
fn a_controller_without_a_usable_command_set_is_refused() {
    let rig = Rig::new(small());
    rig.machine.inject(capability(0));

    let error = refusal(&rig);

    assert!(error.contains("(no NVM command set), but CSS bit 0 is needed"), "{error}");
}

fn zoned() -> Options {
    let zones = ZoneOptions { size: 1 << 20, max_open: 5, append_limit: 3, ..ZoneOptions::default() };
    Options { command_set: Some(2), zones, ..small() }
}

#[test]
fn a_zoned_namespace_is_served_with_its_zones_and_without_discard_and_zeroes() {
    let rig = Rig::new(zoned());

    let (nvme, _queues) = rig.up(1);

    let geometry = nvme.geometry();
    let zones = ZoneGeometry { blocks: 2048, max_open: 5, max_active: 0, max_append: 32 << 10 };
    assert_eq!((geometry.zones, geometry.boundary), (Some(zones), 2048));
    assert_eq!((geometry.discard, geometry.zeroes), (None, None));
    let plain = Rig::new(small());
    assert_eq!(plain.up(1).0.geometry().zones, None);
}

#[test]
fn a_zoned_namespace_whose_zones_cannot_be_told_is_refused() {
    let rig = Rig::new(Options { command_set: Some(2), ..small() });
    let error = refusal(&rig);
    assert!(error.contains("Identify (Zoned Namespace) failed: Invalid Field in Command"), "{error}");

    let rig = Rig::new(zoned());
    rig.machine.inject(Fault::Identify { cns: 5, offset: 2816, bytes: vec![0; 8] });
    let error = refusal(&rig);
    assert!(error.contains("zone size is 0 blocks of 512 bytes"), "{error}");
}

#[test]
fn a_drive_with_other_zones_after_a_reset_is_not_the_same() {
    let rig = Rig::new(zoned());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.machine.inject(Fault::Identify { cns: 5, offset: 2816, bytes: 4096_u64.to_le_bytes().to_vec() });

    let error = nvme.recover().err().unwrap().to_string();

    assert!(error.contains("is no longer what it was: namespace 1 has zones"), "{error}");
    rig.machine.clear_faults();
    nvme.recover().unwrap();
}
