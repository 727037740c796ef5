//! The commands of a correct front-end and their replies.

use std::os::fd::AsFd;

use crate::client::{CONFIG, GET_INFO, GET_IRQ_INFO, GET_REGION_INFO, NO_REPLY, REGION_READ, VERSION, access, words};
use crate::rig::{Rig, memory};

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn the_version_is_negotiated_with_limits() {
    let rig = Rig::new();

    let reply = rig.connect().version().unwrap();

    assert_eq!(reply.payload[..4], [0, 0, 1, 0], "0.1");
    let text = std::str::from_utf8(&reply.payload[4..]).unwrap();
    let expected =
        r#"{"capabilities":{"max_data_xfer_size":1048576,"max_dma_maps":4096,"max_msg_fds":16,"pgsizes":4096}}"#;
    assert_eq!(text.strip_suffix('\0'), Some(expected));
}

#[test]
fn an_older_minor_version_is_accepted_and_capabilities_are_optional() {
    let rig = Rig::new();
    let mut client = rig.connect();

    let reply = client.call(VERSION, &[0, 0, 0, 0], &[]).unwrap();

    assert_eq!(reply.payload, [&[0, 0, 0, 0][..], b"{\"capabilities\":{}}\0"].concat());
    assert_eq!(client.read(CONFIG, 0, 2).unwrap(), [0xfe, 0xff], "the vendor");
}

#[test]
fn the_device_is_a_pci_function_that_can_be_reset() {
    let rig = Rig::new();
    let mut client = rig.client();

    let info = client.call(GET_INFO, &words(&[16, 0, 0, 0]), &[]).unwrap().payload;

    assert_eq!(info, words(&[16, 0b11, 9, 5]));
}

#[test]
fn regions_are_those_of_vfio_and_registers_of_the_emulated_function_are_trapped() {
    let rig = Rig::new();
    let mut client = rig.client();

    let infos: Vec<_> = (0..9)
        .map(|index| client.call(GET_REGION_INFO, &words(&[32, 0, index, 0, 0, 0, 0, 0]), &[]).unwrap())
        .collect();

    let sizes: Vec<_> = infos.iter().map(|info| long(&info.payload, 16)).collect();
    assert_eq!(sizes[1..], [0, 0, 0, 0, 0, 0, 4096, 0], "BARs 1 to 5, ROM, configuration space, VGA");
    assert!(sizes[0].is_power_of_two() && sizes[0] >= 0x2000, "{sizes:?}");
    for (index, info) in (0..).zip(&infos) {
        assert_eq!((word(&info.payload, 0), word(&info.payload, 8)), (32, index), "argsz, index");
        let access = if matches!(index, 0 | 7) { 0b11 } else { 0 };
        assert_eq!(word(&info.payload, 4), access, "read and write, no mmap, no capabilities");
        assert!(info.fds.is_empty());
    }
}

#[test]
fn interrupts_are_those_of_vfio() {
    let rig = Rig::new();
    let mut client = rig.client();

    let counts: Vec<_> = (0..5)
        .map(|index| client.call(GET_IRQ_INFO, &words(&[16, 0, index, 0]), &[]).unwrap().payload)
        .map(|info| word(&info, 12))
        .collect();

    assert_eq!(counts, [0, 0, 17, 1, 1], "INTx, MSI, MSI-X, ERR, REQ");
}

#[test]
fn configuration_space_is_read_and_written_at_any_width() {
    let rig = Rig::new();
    let mut client = rig.client();

    let whole = client.read(CONFIG, 0, 4096).unwrap();
    client.write(CONFIG, 0x3c, &[11]).unwrap();

    assert_eq!(whole[0x0b], 0x01, "mass storage");
    assert_eq!(client.read(CONFIG, 0x09, 3).unwrap(), [0x02, 0x08, 0x01], "an odd offset and width");
    assert_eq!(client.read(CONFIG, 0x3c, 1).unwrap(), [11], "the interrupt line");
}

#[test]
fn registers_are_read_at_any_width_and_written_only_as_a_whole() {
    let rig = Rig::new();
    let mut client = rig.client();

    client.write(0, 0x28, &0x1234_5678_9abc_d000_u64.to_le_bytes()).unwrap();
    client.write(0, 0x2c, &0x1111_1111_u32.to_le_bytes()).unwrap();
    client.write(0, 0x2c, &[0xff]).unwrap();

    assert_eq!(client.read(0, 0x28, 8).unwrap(), 0x1111_1111_9abc_d000_u64.to_le_bytes());
    let bytes: Vec<_> = (0..12).flat_map(|at| client.read(0, at, 1).unwrap()).collect();
    assert_eq!(client.read(0, 0, 12).unwrap(), bytes);
}

#[test]
fn commands_sent_together_are_answered_in_order() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = memory(0x10_0000);

    let mut ids = Vec::new();
    for n in 0..64_u64 {
        let map = [&words(&[32, 3])[..], &crate::client::longs(&[n * 0x1000, n * 0x1000, 0x1000])].concat();
        ids.push(client.send(crate::client::DMA_MAP, 0, &map, &[guest.as_fd()]));
        ids.push(client.send(REGION_READ, 0, &access(CONFIG, 0, 4), &[]));
    }
    let replies: Vec<_> = ids.iter().map(|_| client.receive().unwrap()).collect();

    assert_eq!(replies.iter().map(|reply| reply.id).collect::<Vec<_>>(), ids);
    assert!(replies.iter().all(|reply| reply.flags == 1));
    assert_eq!(rig.mapped(), 64 * 0x1000);
}

#[test]
fn a_command_without_a_reply_is_executed_before_the_next() {
    let rig = Rig::new();
    let mut client = rig.client();

    client.send(crate::client::REGION_WRITE, NO_REPLY, &[access(CONFIG, 0x3c, 1), vec![9]].concat(), &[]);
    client.send(REGION_READ, NO_REPLY, &access(CONFIG, 4096, 1), &[]);
    let line = client.read(CONFIG, 0x3c, 1).unwrap();

    assert_eq!(line, [9], "the reply is that of the last command");
}
