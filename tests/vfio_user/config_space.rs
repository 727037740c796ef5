//! The guest's access to Enable No Snoop.

use vhost_device_vfio::coherency::Policy;
use vhost_device_vfio::emulated::Options;

use crate::client::{CONFIG, Client, DEVICE_RESET};
use crate::rig::Rig;

/// Device Control of the emulated function; Enable No Snoop is bit 3 of its high byte, Function Level Reset bit 7.
const DEVICE_CONTROL: u64 = 0x58;
const NO_SNOOP: u8 = 1 << 3;
const FUNCTION_LEVEL_RESET: u8 = 1 << 7;

/// A function with Enable No Snoop set at power-on, behind an IOMMU that does not enforce snooping.
fn controllable(policy: Policy) -> Rig {
    let options = Options { size: 1 << 20, no_snoop: true, snoop_enforced: false, ..Options::default() };
    Rig::with(&options, policy)
}

/// The high byte of Device Control as the guest reads it.
fn guest_view(client: &mut Client) -> u8 {
    client.read(CONFIG, DEVICE_CONTROL + 1, 1).unwrap()[0]
}

/// The high byte of the function's own Device Control.
fn function_view(rig: &Rig) -> u8 {
    let mut bytes = [0];
    rig.machine.function().config_read(0x59, &mut bytes).unwrap();
    bytes[0]
}

#[test]
fn a_guest_cannot_set_the_bit_while_it_is_disabled() {
    let rig = controllable(Policy::Suppress);
    let mut client = rig.client();
    assert_eq!(function_view(&rig) & NO_SNOOP, 0, "cleared before the guest connects");

    client.write(CONFIG, DEVICE_CONTROL + 1, &[NO_SNOOP | 0x20]).unwrap();
    assert_eq!((function_view(&rig), guest_view(&mut client)), (0x20, 0x20), "a byte");
    client.write(CONFIG, DEVICE_CONTROL, &[0x10, NO_SNOOP | 0x40]).unwrap();
    assert_eq!((function_view(&rig), guest_view(&mut client)), (0x40, 0x40), "a word");
    client.write(CONFIG, DEVICE_CONTROL - 4, &[0, 0, 0, 0, 0x10, NO_SNOOP, 0, 0]).unwrap();

    assert_eq!((function_view(&rig), guest_view(&mut client)), (0, 0), "in the middle of a longer write");
}

#[test]
fn the_bit_is_cleared_after_each_kind_of_reset() {
    let rig = controllable(Policy::Suppress);
    let mut client = rig.client();

    client.call(DEVICE_RESET, &[], &[]).unwrap();
    assert_eq!(function_view(&rig) & NO_SNOOP, 0, "VFIO_USER_DEVICE_RESET");
    client.write(CONFIG, DEVICE_CONTROL + 1, &[FUNCTION_LEVEL_RESET]).unwrap();

    assert_eq!(function_view(&rig) & NO_SNOOP, 0, "Function Level Reset by the guest");
    assert_eq!(guest_view(&mut client) & NO_SNOOP, 0);
}

#[test]
fn a_bit_set_by_the_function_is_hidden_and_cleared_before_bus_master_is_enabled() {
    let rig = controllable(Policy::Suppress);
    let mut client = rig.client();
    rig.machine.function().config_write(0x59, &[NO_SNOOP]).unwrap();

    assert_eq!(guest_view(&mut client) & NO_SNOOP, 0);
    client.write(CONFIG, 0x04, &[0b110]).unwrap();

    assert_eq!(function_view(&rig) & NO_SNOOP, 0);
}

#[test]
fn a_guest_controls_the_bit_if_memory_is_flushed() {
    let rig = controllable(Policy::Allow);
    let mut client = rig.client();

    client.write(CONFIG, DEVICE_CONTROL + 1, &[0]).unwrap();
    assert_eq!((function_view(&rig), guest_view(&mut client)), (0, 0));
    client.write(CONFIG, DEVICE_CONTROL + 1, &[NO_SNOOP]).unwrap();

    assert_eq!((function_view(&rig), guest_view(&mut client)), (NO_SNOOP, NO_SNOOP));
}
