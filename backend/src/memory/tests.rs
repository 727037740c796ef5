use std::fs::File;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

const PAGE: u64 = 4096;

fn memory(bytes: u64) -> Arc<File> {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    Arc::new(File::from(fd))
}

/// The same file, open for reading only.
fn read_only(file: &File) -> Arc<File> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    Arc::new(File::open(path).unwrap())
}

fn spec(file: &Arc<File>, gpa: u64, len: u64, qva: u64, offset: u64) -> RegionSpec {
    RegionSpec { gpa: Span::new(Gpa(gpa), len).unwrap(), qva: Qva(qva), offset, file: Arc::clone(file) }
}

fn region(file: &Arc<File>, gpa: u64, len: u64, qva: u64, offset: u64) -> Arc<Region> {
    Arc::new(Region::map(spec(file, gpa, len, qva, offset)).unwrap())
}

fn map_error(spec: RegionSpec) -> String {
    Region::map(spec).err().expect("refused").to_string()
}

mod a_region {
    use super::*;

    #[test]
    fn shows_what_the_file_holds_at_its_offset() {
        let file = memory(4 * PAGE);
        rustix::io::pwrite(&*file, b"guest", 2 * PAGE + 10).unwrap();

        let region = region(&file, 0x10_0000, PAGE, 0x7f00_0000, 2 * PAGE);

        let mut seen = [0; 5];
        region.memory().copy_to(10, &mut seen);
        assert_eq!(&seen, b"guest");
    }

    #[test]
    fn past_the_end_of_its_file_is_refused() {
        let file = memory(2 * PAGE);
        let message = map_error(spec(&file, 0, 2 * PAGE, 0, PAGE));
        assert!(message.contains("needs 12288 bytes of its file, which has 8192"), "{message}");
    }

    #[test]
    fn is_at_its_guests_part_of_the_devices_addresses_and_is_refused_beyond() {
        const GIB: u64 = 1 << 30;
        let allowed = Span::new(Iova(0), 5 * GIB).unwrap();
        let slice = IovaSlice::divide(&[allowed], 2).unwrap()[1];
        let file = memory(2 * PAGE);

        let region = Region::map_in(spec(&file, GIB, PAGE, 0, 0), slice).unwrap();
        let beyond = Region::map_in(spec(&file, 2 * GIB - PAGE, 2 * PAGE, 0, 0), slice).err().unwrap().to_string();

        assert_eq!((region.iova(), region.slice()), (Span::new(Iova(3 * GIB), PAGE).unwrap(), slice));
        assert!(beyond.contains("0x7ffff000+8K ends above the first 2G of guest addresses"), "{beyond}");
    }

    #[test]
    fn that_would_overflow_is_refused() {
        let file = memory(PAGE);
        let top = u64::MAX - PAGE + 1;
        assert!(matches!(Region::map(spec(&file, 0, PAGE, 0, top)), Err(RegionError::Range { .. })), "offset");
        assert!(
            matches!(Region::map(spec(&file, 0, PAGE, top + 1, 0)), Err(RegionError::Range { .. })),
            "user address"
        );
        let last_page = spec(&memory(2 * PAGE), top, 1, 0, 0);
        assert!(Region::map(last_page).is_ok(), "the last page ends where the address space ends");
    }

    #[test]
    fn that_is_not_page_aligned_is_refused() {
        let file = memory(4 * PAGE);
        for (gpa, offset) in [(0x800, 0), (0, 0x800), (1, 1)] {
            let message = map_error(spec(&file, gpa, PAGE, 0, offset));
            assert!(message.contains("not aligned to its page size of 4K"), "{message}");
        }
    }

    #[test]
    fn that_ends_inside_a_page_is_extended_to_the_end_of_the_page() {
        let file = memory(PAGE + 0x123);

        let region = region(&file, 0x1000, PAGE + 0x123, 0x7000, 0);

        assert_eq!(region.gpa(), Span::new(Gpa(0x1000), 2 * PAGE).unwrap());
        assert_eq!(region.qva().len(), PAGE + 0x123);
        assert!(!region.pinnable(), "the file itself cannot be pinned past its end");
        region.memory().write_u8(0x1fff, 1);
    }

    #[test]
    fn of_a_memfd_is_pinnable() {
        assert!(region(&memory(PAGE), 0, PAGE, 0, 0).pinnable());
    }

    #[test]
    fn that_is_not_a_file_is_refused_with_what_it_is() {
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let directory = File::open("/").unwrap();
        let device = File::open("/dev/zero").unwrap();
        for (fd, name) in [(pipe, "\"pipe:["), (directory.into(), "\"/\""), (device.into(), "\"/dev/zero\"")] {
            let message = map_error(spec(&Arc::new(File::from(fd)), 0, PAGE, 0, 0));
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn whose_file_system_need_not_answer_is_refused_before_it_is_asked() {
        // `fstat` of this file gives size 0. To be refused for that, it would have been asked.
        let procfs = Arc::new(File::open("/proc/self/maps").unwrap());
        let message = map_error(spec(&procfs, 0, PAGE, 0, 0));
        assert!(message.contains("/maps\", not of a file in memory"), "{message}");
        assert!(matches!(FileId::of(&procfs, Span::new(Gpa(0), PAGE).unwrap()), Err(RegionError::NotMemory { .. })));
    }

    #[test]
    fn that_the_device_may_not_write_needs_a_descriptor_for_reading_only() {
        let file = memory(PAGE);
        rustix::io::pwrite(&*file, b"rom", 0).unwrap();

        let region = Region::map_piece(spec(&read_only(&file), 0, PAGE, 0, 0), false).unwrap();

        let mut seen = [0; 3];
        region.memory().copy_to(0, &mut seen);
        assert_eq!((&seen, region.writable()), (b"rom", false));
    }

    #[test]
    fn shares_the_descriptor_of_another_with_the_same_file_and_access() {
        let file = memory(2 * PAGE);
        let regions = [region(&file, 0, PAGE, 0, 0)];
        let mut again = spec(&Arc::new(file.try_clone().unwrap()), PAGE, PAGE, PAGE, PAGE);
        let mut for_reading = spec(&read_only(&file), PAGE, PAGE, PAGE, PAGE);
        let mut other = spec(&memory(2 * PAGE), PAGE, PAGE, PAGE, PAGE);

        for spec in [&mut again, &mut for_reading, &mut other] {
            spec.share_file(regions.iter()).unwrap();
        }

        assert_eq!([again, for_reading, other].map(|spec| Arc::ptr_eq(&spec.file, &file)), [true, false, false]);
    }

    #[test]
    fn that_cannot_be_written_is_refused_with_its_errno() {
        match Region::map(spec(&read_only(&memory(PAGE)), 0, PAGE, 0, 0)) {
            Err(RegionError::Kernel { call: "mmap", source, .. }) => {
                assert_eq!(source.raw_os_error(), Some(libc::EACCES));
            }
            _ => panic!("a read-only descriptor was mapped"),
        }
    }

    #[test]
    fn of_huge_pages_must_be_aligned_to_them() {
        let Ok(fd) = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) else {
            return; // This kernel has no 2 MiB pages.
        };
        let file = Arc::new(File::from(fd));
        if ftruncate(&*file, 4 << 20).is_err() {
            return;
        }
        let message = map_error(spec(&file, PAGE, 2 << 20, 0, 0));
        assert!(message.contains("not aligned to its page size of 2M"), "{message}");
        // Mapping reserves huge pages. If this machine has none, the error must carry the errno.
        match Region::map(spec(&file, 0, PAGE, 0, 2 << 20)) {
            Ok(region) => assert_eq!(region.gpa().len(), 2 << 20),
            Err(RegionError::Kernel { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::ENOMEM)),
            Err(other) => panic!("{other}"),
        }
    }

    /// Pages are replaced one by one up to a number for all mappings together. So the tests that lose many, and those that count
    /// them, take turns.
    static LOSSES: Mutex<()> = Mutex::new(());

    #[test]
    fn whose_file_is_truncated_reads_as_zero_past_the_new_end() {
        let _turn = LOSSES.lock();
        let file = memory(4 * PAGE);
        let region = region(&file, 0, 4 * PAGE, 0, 0);
        let page = PAGE as usize;
        (0..4).for_each(|n| region.memory().write_u8(n * page, 7));

        ftruncate(&*file, 2 * PAGE).unwrap();

        let read = |n: usize| region.memory().read_u8(n * page);
        assert_eq!([0, 1, 2, 3].map(read), [7, 7, 0, 0]);
        region.memory().write_u8(2 * page, 9);
        assert_eq!(read(2), 9, "a private page of this process");
        assert_eq!(region.memory().lost_pages(), 2);
    }

    #[test]
    fn of_which_every_other_page_is_lost_does_not_exhaust_the_mappings_of_this_process() {
        let _turn = LOSSES.lock();
        // Each replaced page alone would be a mapping, and so would each that has not been accessed (vm.max_map_count).
        let pages = 2 * 40_000;
        let file = memory(pages * PAGE);
        let region = region(&file, 0, pages * PAGE, 0, 0);
        ftruncate(&*file, 0).unwrap();

        let read = (0..pages).step_by(2).map(|n| region.memory().read_u8((n * PAGE) as usize));

        assert!(read.into_iter().all(|byte| byte == 0));
        assert!(region.memory().lost_pages() < 20_000);
    }

    #[test]
    fn knows_whether_its_file_can_shrink() {
        let fd = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, PAGE).unwrap();
        let file = Arc::new(File::from(fd));
        let region = region(&file, 0, PAGE, 0, 0);
        assert!(!region.sealed_against_shrinking());

        rustix::fs::fcntl_add_seals(&*file, rustix::fs::SealFlags::SHRINK).unwrap();

        assert!(region.sealed_against_shrinking());
    }
}

mod a_table {
    use super::*;

    #[test]
    fn translates_a_span_across_two_regions_for_the_device_only() {
        let file = memory(4 * PAGE);
        let table = MemTable::new(vec![
            region(&file, 2 * PAGE, PAGE, 0x20_0000, PAGE),
            region(&file, PAGE, PAGE, 0x10_0000, 0),
            region(&file, 4 * PAGE, PAGE, 0x30_0000, 3 * PAGE),
        ])
        .unwrap();
        let crossing = Span::new(Gpa(2 * PAGE - 8), 16).unwrap();
        let gap = Span::new(Gpa(3 * PAGE - 8), 16).unwrap();
        let mut hint = 99;

        assert_eq!(table.iova(crossing, &mut hint), Some(IovaSlice::WHOLE.iova(crossing)));
        assert!(table.host_memory(crossing, &mut hint).is_none());
        assert_eq!(table.iova(gap, &mut hint), None);
        assert_eq!(table.to_string(), "0x1000+4K, 0x2000+4K, 0x4000+4K");
    }

    #[test]
    fn with_an_overlap_in_either_address_space_is_refused() {
        let file = memory(4 * PAGE);
        let first = region(&file, 0, 2 * PAGE, 0x10_0000, 0);
        let same_gpa = region(&file, PAGE, PAGE, 0x20_0000, 0);
        let same_qva = region(&file, 0x10_0000, PAGE, 0x10_1000, 0);
        assert!(matches!(MemTable::new(vec![same_gpa, Arc::clone(&first)]), Err(RegionError::Overlap { .. })));
        assert!(matches!(MemTable::new(vec![first, same_qva]), Err(RegionError::Overlap { .. })));
    }

    #[test]
    fn translates_front_end_addresses_within_one_region() {
        let file = memory(4 * PAGE);
        let table = MemTable::new(vec![region(&file, 0x10_0000, 2 * PAGE, 0x7f00_0800, 0)]).unwrap();
        assert_eq!(table.gpa(Qva(0x7f00_0900), 16), Span::new(Gpa(0x10_0100), 16));
        assert_eq!(table.gpa(Qva(0x7f00_0800 + 2 * PAGE - 8), 9), None);
        assert_eq!(table.gpa(Qva(0x7f00_07ff), 1), None);
        assert_eq!(table.gpa(Qva(u64::MAX), 2), None);
    }
}

mod a_plan {
    use super::*;

    #[test]
    fn keeps_a_region_announced_again_with_another_descriptor() {
        let file = memory(2 * PAGE);
        let old = MemTable::new(vec![region(&file, 0, PAGE, 0x1000, PAGE)]).unwrap();
        let again = Arc::new(file.try_clone().unwrap());

        let plan = Plan::replacing(&old, vec![spec(&again, 0, PAGE, 0x1000, PAGE)]);

        assert!(Arc::ptr_eq(&plan.keep[0], &old.regions()[0]));
        assert!(plan.add.is_empty() && plan.remove.is_empty());
        assert!(Plan::adding(&old, spec(&again, 0, PAGE, 0x1000, PAGE)).add.is_empty());
    }

    #[test]
    fn replaces_a_region_when_anything_about_it_differs() {
        let (file, other) = (memory(4 * PAGE), memory(4 * PAGE));
        let old = MemTable::new(vec![region(&file, 0, PAGE, 0x1000, PAGE)]).unwrap();
        let different = [
            spec(&other, 0, PAGE, 0x1000, PAGE),
            spec(&file, 0, 2 * PAGE, 0x1000, PAGE),
            spec(&file, PAGE, PAGE, 0x1000, PAGE),
            spec(&file, 0, PAGE, 0x2000, PAGE),
            spec(&file, 0, PAGE, 0x1000, 0),
        ];
        for spec in different {
            let plan = Plan::replacing(&old, vec![spec.clone()]);
            assert_eq!((plan.remove.len(), plan.keep.len(), plan.add.len()), (1, 0, 1), "{spec:?}");
        }
    }

    #[test]
    fn removes_only_the_region_with_the_same_address_and_size() {
        let file = memory(2 * PAGE + 0x10);
        let short = region(&file, 0, PAGE + 0x10, 0x1000, 0);
        let old = MemTable::new(vec![short]).unwrap();
        let span = |len| Span::new(Gpa(0), len).unwrap();
        assert!(Plan::removing(&old, span(PAGE), Qva(0x1000)).is_none(), "another size");
        assert!(Plan::removing(&old, span(PAGE + 0x10), Qva(0x2000)).is_none(), "another address in the front-end");
        assert!(Plan::removing(&old, span(PAGE + 0x10), Qva(0x1000)).is_some());
    }

    /// Regions that a front-end may announce: which of two files, guest page, number of pages, page in the file.
    fn announcement() -> impl Strategy<Value = Vec<(usize, u64, u64, u64)>> {
        prop::collection::vec((0..2_usize, 0..12_u64, 1..4_u64, 0..6_u64), 0..5)
    }

    proptest! {
        /// After any sequence of tables, the regions are those announced, and no region that stays is mapped again.
        #[test]
        fn follows_any_sequence_of_tables(tables in prop::collection::vec(announcement(), 1..8)) {
            let files = [memory(8 * PAGE), memory(8 * PAGE)];
            let mut table = MemTable::default();
            let mut model: Vec<(usize, u64, u64, u64)> = Vec::new();
            for announced in tables {
                let specs = announced.iter().map(|&(file, page, pages, offset)| {
                    spec(&files[file], page * PAGE, pages * PAGE, 0x1000_0000 + page * PAGE, offset * PAGE)
                });
                let plan = Plan::replacing(&table, specs.collect());
                let old: Vec<_> = table.regions().to_vec();
                let added: Result<Vec<_>, _> = plan.add.iter().cloned().map(|spec| Region::map(spec).map(Arc::new)).collect();
                let next = added.and_then(|added| plan.table(&added));

                let disjoint = announced.iter().enumerate().all(|(i, a)| {
                    announced[..i].iter().all(|b| a.1 + a.2 <= b.1 || b.1 + b.2 <= a.1)
                });
                let inside = announced.iter().all(|(_, _, pages, offset)| pages + offset <= 8);
                prop_assert_eq!(next.is_ok(), disjoint && inside);
                let Ok(next) = next else { continue };
                for kept in announced.iter().filter(|region| model.contains(region)) {
                    let find = |regions: &[Arc<Region>]| {
                        regions.iter().find(|region| region.gpa().start() == Gpa(kept.1 * PAGE)).cloned().unwrap()
                    };
                    prop_assert!(Arc::ptr_eq(&find(&old), &find(next.regions())));
                }
                prop_assert_eq!(plan.remove.len(), model.iter().filter(|region| !announced.contains(region)).count());
                prop_assert_eq!(next.regions().len(), announced.len());
                (table, model) = (next, announced);
            }
        }
    }
}

#[test]
fn a_piece_may_start_and_end_inside_the_pages_of_its_file() {
    let file = memory(3 << 12);
    let whole = Region::map(spec(&file, 0, 3 << 12, 0, 0)).unwrap();
    whole.memory().write_u32((2 << 12) - 4, 0x1234_5678);

    let piece = Region::map_piece(spec(&file, 0x5000, 1 << 12, 0, 1 << 12), true).unwrap();

    assert_eq!(piece.memory().read_u32((1 << 12) - 4), 0x1234_5678);
    assert_eq!((piece.offset(), piece.gpa().len()), (1 << 12, 1 << 12));
    assert!(Region::map_piece(spec(&file, 0x5000, 0x800, 0, 0x800), true).is_err(), "not aligned to IOMMU pages");
}
