//! A zoned drive is served only to a front-end that tells its guest of the zones.

use vhost_device_vfio::emulated::{Options, ZoneOptions};

use crate::mistakes::{capture_log, logged_lines};
use crate::rig::Rig;
use crate::wire::{FEATURES, PROTOCOL, Reply, Wire, request::*, words};

const ZONED: u64 = 1 << 17;

fn rig() -> Rig {
    let zones = ZoneOptions { size: 1 << 20, max_open: 3, max_active: 5, ..ZoneOptions::default() };
    Rig::with_drive(Options { size: 16 << 20, queues: 2, command_set: Some(2), zones, ..Options::default() })
}

/// Reads `size` bytes of configuration space from `offset`; `None` if that is refused.
fn config(wire: &Wire, offset: u32, size: u32) -> Option<Vec<u8>> {
    let header: Vec<u8> = [offset, size, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    wire.send(GET_CONFIG, &[header, vec![0; size as usize]].concat(), &[]);
    match wire.reply() {
        Reply::Message(_, payload) if payload.len() == 12 + size as usize => Some(payload[12..].to_vec()),
        _ => None,
    }
}

#[test]
fn a_front_end_that_acknowledges_zones_reads_their_characteristics() {
    let rig = rig();
    let wire = rig.connect();
    wire.negotiate_with(FEATURES | ZONED, PROTOCOL);

    let space = config(&wire, 0, 96).unwrap();

    let field = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!([72, 76, 80, 84, 88, 92].map(field), [2048, 3, 5, 128, 512, 1]);
    assert_eq!(config(&wire, 72, 4).unwrap(), 2048_u32.to_le_bytes(), "field by field");
    assert_eq!(config(&wire, 0, 8).unwrap(), (32768_u64).to_le_bytes(), "the first one, too");
}

#[test]
fn a_front_end_that_does_not_acknowledge_zones_is_refused_with_the_reason() {
    capture_log();
    let rig = rig();
    let wire = rig.connect();
    assert_eq!(wire.get(GET_FEATURES) & (ZONED | 3 << 13), ZONED, "and neither discard nor write-zeroes");
    wire.send(SET_PROTOCOL_FEATURES, &words(&[PROTOCOL]), &[]);

    assert_ne!(wire.call(SET_FEATURES, &words(&[FEATURES]), &[]), 0);

    assert_ne!(logged_lines(&["the drive is zoned", "VIRTIO_BLK_F_ZONED", "vhost-user-test-device-pci"]), 0);
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES | ZONED]), &[]), 0, "it can do better");
}

#[test]
fn a_front_end_whose_configuration_space_ends_before_the_zones_is_refused_when_it_reads_it() {
    capture_log();
    let rig = rig();
    let wire = rig.connect();
    wire.get(GET_FEATURES);
    wire.send(SET_PROTOCOL_FEATURES, &words(&[PROTOCOL]), &[]);

    assert_eq!(config(&wire, 0, 57), None, "QEMU's vhost-user-blk");

    assert_ne!(logged_lines(&["the drive is zoned", "57 bytes of configuration space", "config_size=96"]), 0);
}
