use super::*;

fn shared(len: usize) -> SharedMemory {
    SharedMemory::of(Arc::new(MmapRegion::new(len).expect("anonymous memory")))
}

#[test]
fn copies_of_any_alignment_return_what_was_written() {
    let shared = shared(4096);
    for offset in 0..9 {
        for len in 0..40_usize {
            let written: Vec<u8> = (0..len).map(|i| (i * 7 + offset + 1) as u8).collect();
            shared.copy_from(offset, &written);
            let mut read = vec![0; len];
            shared.copy_to(offset, &mut read);
            assert_eq!(read, written, "offset {offset}, length {len}");
        }
    }
}

#[test]
fn words_are_little_endian() {
    let shared = shared(4096);
    shared.write_u32(8, 0x0403_0201);
    assert_eq!(shared.read_u8(8), 1);
    assert_eq!(shared.read_u16(10), 0x0403);
}

#[test]
#[should_panic(expected = "8 bytes at 4089")]
fn an_access_past_the_end_panics() {
    let _ = shared(4096).read_u64(4089);
}

#[test]
#[should_panic(expected = "misaligned")]
fn a_misaligned_atomic_panics() {
    let _ = shared(4096).load_acquire_u16(1);
}

#[test]
fn a_slice_past_the_end_is_refused() {
    let shared = shared(4096);
    assert!(shared.slice(4096, 0).is_some());
    assert!(shared.slice(4095, 2).is_none());
    assert!(shared.slice(usize::MAX, 2).is_none());
}

#[test]
fn a_copy_to_shared_memory_changes_only_the_target_bytes() {
    let bytes: Vec<u8> = (0..1500_u32).map(|i| (i % 250) as u8 + 1).collect();
    for (offset, target, len) in [(3, 5, 1500), (8, 16, 1500), (8, 16, 1496), (8, 3, 64), (4096, 4096, 0)] {
        let (from, to) = (shared(4096), shared(4096));
        from.copy_from(offset, &bytes[..len]);

        from.copy_to_shared(offset, &to, target, len);

        let mut read = vec![0; 4096];
        to.copy_to(0, &mut read);
        let mut expected = vec![0; 4096];
        expected[target..target + len].copy_from_slice(&bytes[..len]);
        assert_eq!(read, expected, "{len} bytes from {offset} to {target}");
    }
}

#[test]
#[should_panic(expected = "9 bytes at 4088")]
fn a_copy_past_the_end_of_the_target_panics() {
    shared(8192).copy_to_shared(0, &shared(4096), 4088, 9);
}

#[test]
fn clear_zeroes_a_view_of_any_size_and_nothing_else() {
    let shared = shared(4096);
    shared.copy_from(0, &[1; 4096]);
    shared.slice(8, 13).expect("inside").clear();
    assert_eq!((shared.read_u64(8), shared.read_u8(20), shared.read_u8(21), shared.read_u8(7)), (0, 0, 1, 1));
}
