//! Namespaces and controllers that are no disks are refused by name.

use super::rig::{Rig, nvme_options, small};
use crate::driver::Driver;
use crate::emulated::{Fault, Options};

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
    for (set, name) in [(1, "a key-value store"), (2, "zoned"), (0x33, "of its vendor's own command set")] {
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
