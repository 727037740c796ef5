use zerocopy::FromZeros;

use super::super::spec::LbaFormat;
use super::*;

fn controller() -> IdentifyController {
    let mut data = IdentifyController::new_zeroed();
    data.sqes = 0x66;
    data.cqes = 0x44;
    data.sn = *b"S4EWNX0N123456      ";
    data
}

fn identity() -> Identity {
    Identity::decode(&controller()).unwrap()
}

fn namespace(data_shift: u8, metadata: u16) -> IdentifyNamespace {
    let mut data = IdentifyNamespace::new_zeroed();
    data.nsze = 1 << 20;
    data.flbas = 1;
    data.lbaf[1] = LbaFormat { metadata, data_shift, performance: 0 };
    data
}

fn decode(data: &IdentifyNamespace) -> Result<Option<Namespace>, NvmeErrorKind> {
    Namespace::decode(1, data, &identity())
}

#[test]
fn text_from_the_device_is_printable_and_unpadded() {
    assert_eq!(printable(b"  QEMU NVMe Ctrl   "), "QEMU NVMe Ctrl");
    assert_eq!(printable(b"abc\0\0\0 "), "abc");
    assert_eq!(printable(b"a\x1b[2Jb\xff\0c"), "a?[2Jb??c");
    assert_eq!(printable(&[0; 20]), "");
    assert_eq!(printable(&[b' '; 20]), "");
}

#[test]
fn the_longest_transfer_follows_mdts_within_one_list_page() {
    assert_eq!(max_transfer(0), 1 << 20);
    assert_eq!(max_transfer(1), 8192);
    assert_eq!(max_transfer(7), 512 << 10);
    assert_eq!(max_transfer(8), 1 << 20);
    assert_eq!(max_transfer(9), 2 << 20);
    assert_eq!(max_transfer(255), 2 << 20);
}

#[test]
fn shutdown_limits_are_bounded_on_both_sides() {
    let limit = |rtd3e| Identity::decode(&IdentifyController { rtd3e, ..controller() }).unwrap().shutdown_limit;
    assert_eq!(limit(0), Duration::from_secs(5));
    assert_eq!(limit(8_000_000), Duration::from_secs(8));
    assert_eq!(limit(u32::MAX), Duration::from_secs(60));
}

#[test]
fn a_controller_of_another_kind_or_entry_size_is_refused() {
    let discovery = Identity::decode(&IdentifyController { cntrltype: 2, ..controller() });
    assert!(matches!(discovery, Err(NvmeErrorKind::Unsuitable { property: "controller type", .. })));
    let large_entries = Identity::decode(&IdentifyController { sqes: 0x77, ..controller() });
    assert_eq!(
        large_entries.unwrap_err().to_string(),
        "submission queue entry sizes (SQES) is 7 to 7, but 6 (64 bytes) in the range is needed"
    );
    assert!(Identity::decode(&IdentifyController { cqes: 0, ..controller() }).is_err());
}

#[test]
fn namespaces_of_512_and_4096_bytes_are_served() {
    let namespace_512 = decode(&namespace(9, 0)).unwrap().unwrap();
    let namespace_4096 = decode(&namespace(12, 0)).unwrap().unwrap();
    assert_eq!((namespace_512.block_size, namespace_512.blocks), (512, 1 << 20));
    assert_eq!((namespace_4096.block_size, namespace_4096.physical_block_size), (4096, 4096));
}

#[test]
fn errors_about_other_block_formats_state_their_sizes() {
    let message = |data| decode(&data).unwrap_err().to_string();
    let interleaved = IdentifyNamespace { flbas: 1 << 4 | 1, ..namespace(9, 8) };
    assert!(message(interleaved).contains("512 data and 8 metadata bytes"));
    assert!(message(IdentifyNamespace { dps: 1, ..namespace(9, 8) }).contains("--pi=0"), "protection information");
    assert!(message(namespace(12, 129)).contains("4096 data and 129 metadata bytes"));
    assert!(message(namespace(13, 0)).contains("8192 data and 0 metadata bytes"));
    assert!(message(namespace(255, 0)).contains("2^255 data"));
}

#[test]
fn metadata_in_a_buffer_of_their_own_are_served_and_are_part_of_the_format() {
    let (with, without) = (decode(&namespace(12, 64)).unwrap().unwrap(), decode(&namespace(12, 0)).unwrap().unwrap());
    assert_eq!((with.block_size, with.metadata), (4096, 64));
    let difference = with.difference(&without).unwrap();
    assert_eq!(difference, "namespace 1 has blocks of 4096 and 64 metadata bytes instead of 4096");
    assert_eq!(with.difference(&with), None);
}

#[test]
fn the_format_index_has_six_bits() {
    let mut data = namespace(9, 0);
    data.flbas = 0b0110_0011; // index 0b11_0011; bit 4 belongs to metadata
    data.lbaf[0b11_0011] = LbaFormat { metadata: 0, data_shift: 12, performance: 0 };
    assert_eq!(decode(&data).unwrap().unwrap().block_size, 4096);
}

#[test]
fn an_inactive_namespace_is_none_and_an_oversized_one_is_refused() {
    assert_eq!(decode(&IdentifyNamespace { nsze: 0, ..namespace(9, 0) }).unwrap(), None);
    assert!(decode(&IdentifyNamespace { nsze: u64::MAX / 512 + 1, ..namespace(9, 0) }).is_err());
    assert!(decode(&IdentifyNamespace { nsze: u64::MAX / 512, ..namespace(9, 0) }).is_ok());
}

#[test]
fn the_physical_block_is_the_preferred_write_size_up_to_the_atomic_one() {
    let physical = |nsfeat, npwg, nawupf| {
        decode(&IdentifyNamespace { nsfeat, npwg, nawupf, ..namespace(9, 0) }).unwrap().unwrap().physical_block_size
    };
    let (atomic, preferred) = (1 << 1, 1 << 4);
    assert_eq!(physical(0, 7, 7), 512, "neither field is valid");
    assert_eq!(physical(preferred, 7, 7), 512, "AWUPF is one block");
    assert_eq!(physical(preferred | atomic, 7, 7), 4096);
    assert_eq!(physical(preferred | atomic, 7, 3), 2048);
    assert_eq!(physical(preferred | atomic, 6, 7), 512, "not a power of two");
    assert_eq!(physical(preferred | atomic, u16::MAX, u16::MAX), 32 << 20);
}

#[test]
fn the_active_list_ends_where_it_stops_increasing() {
    let mut list = [0; 4096];
    for (index, id) in [1_u32, 2, 7, 7, 9].into_iter().enumerate() {
        list[index * 4..index * 4 + 4].copy_from_slice(&id.to_le_bytes());
    }
    assert_eq!(active_namespaces(&list), [1, 2, 7]);
    assert!(active_namespaces(&[0; 4096]).is_empty());
    assert_eq!(active_namespaces(&[0xff; 4096]), [u32::MAX]);
}

#[test]
fn a_namespace_that_cannot_be_selected_is_reported_with_the_active_ones() {
    assert_eq!(select_namespace(None, &[5]).unwrap(), 5);
    assert_eq!(select_namespace(Some(5), &[3, 5]).unwrap(), 5);
    assert_eq!(select_namespace(Some(4), &[3, 5]).unwrap_err().to_string(), "has no active namespace 4; it has: 3, 5");
    let ambiguous = select_namespace(None, &[3, 5]).unwrap_err().to_string();
    assert_eq!(ambiguous, "has several namespaces: 3, 5; choose one with --namespace");
    assert!(matches!(select_namespace(None, &[]), Err(NvmeErrorKind::NoActiveNamespace)));
    let many: Vec<u32> = (1..=1024).collect();
    assert!(format_ids(&many).ends_with("16, … (1024 in all)"));
}
