//! Valid mappings, placement of buffers, and transfers across several mappings.

use std::sync::Arc;

use vm_memory::MmapRegion;

use super::host::{Host, Sqe, small};
use crate::addr::{Address, Iova, Span};
use crate::emulated::SoftIommu;
use crate::hardware::{AddressSpace, MapError};
use crate::sys::SharedMemory;

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::new(Iova(start), len).unwrap()
}

fn shared(len: usize) -> SharedMemory {
    SharedMemory::of(Arc::new(MmapRegion::new(len).unwrap()))
}

#[test]
fn mappings_outside_the_allowed_ranges_are_refused() {
    let iommu = SoftIommu::new(32, &[span(0xfee0_0000, 1 << 20), span(0x8000_0000, 0x1000)]);
    let allowed = [span(0, 0x8000_0000), span(0x8000_1000, 0x1000), span(0xfff0_0000, 0x10_0000)];
    let refused =
        [span(0x7fff_f000, 0x2000), span(0xfeef_f000, 0x1000), span(0xffff_f000, 0x2000), span(1 << 40, 4096)];

    for span in allowed {
        assert!(iommu.map(span, shared(span.len() as usize)).is_ok(), "{span}");
    }
    for span in refused {
        let error = iommu.map(span, shared(span.len() as usize)).unwrap_err();
        assert!(matches!(error, MapError::NotAllowed { .. }), "{error}");
        assert!(error.to_string().contains("0x80001000-0xfedfffff"), "{error}");
    }
}

#[test]
fn overlaps_are_refused_and_only_exact_spans_unmap() {
    let iommu = SoftIommu::new(48, &[]);
    iommu.map(span(0x10000, 0x4000), shared(0x4000)).unwrap();

    let overlap = iommu.map(span(0x13000, 0x2000), shared(0x2000)).unwrap_err();
    let part = iommu.unmap(span(0x10000, 0x1000)).unwrap_err();

    assert!(matches!(overlap, MapError::Overlap { taken, .. } if taken == span(0x10000, 0x4000)), "{overlap}");
    assert!(matches!(part, MapError::NotMapped { .. }), "{part}");
    assert_eq!(iommu.mapped(), [span(0x10000, 0x4000)]);
    iommu.unmap(span(0x10000, 0x4000)).unwrap();
    assert_eq!(iommu.mapped(), []);
}

#[test]
fn buffers_use_the_highest_free_span_and_are_unmapped_when_dropped() {
    let iommu = SoftIommu::new(32, &[span(0xffff_0000, 0x10000)]);
    iommu.map(span(0xfff0_0000, 0x000f_0000 - 0x2000), shared(0xf_0000 - 0x2000)).unwrap();

    let first = iommu.buffer(4096).unwrap();
    let large = iommu.buffer(5000).unwrap();
    let second = iommu.buffer(100).unwrap();

    assert_eq!(first.span(), span(0xfffe_f000, 0x1000));
    assert_eq!(large.span(), span(0xffef_e000, 0x2000), "below the region");
    assert_eq!(second.span(), span(0xfffe_e000, 0x1000), "in the gap above it");
    let freed = first.span();
    drop(first);
    assert!(!iommu.mapped().contains(&freed));
    assert_eq!(iommu.buffer(1).unwrap().span(), freed);
}

#[test]
fn a_full_address_space_is_reported() {
    let iommu = SoftIommu::new(16, &[]);
    iommu.map(span(0, 0xf000), shared(0xf000)).unwrap();
    assert!(matches!(iommu.buffer(0x2000), Err(MapError::NoIova(0x2000))));
    assert!(iommu.buffer(0x1000).is_ok());
}

#[test]
fn a_transfer_may_cross_adjacent_mappings() {
    let mut host = Host::enabled(small());
    let mut pair = host.pair(1, [8; 2]);
    let (low, high) = (shared(0x1000), shared(0x1000));
    let iommu = host.machine.iommu();
    iommu.map(span(0x10000, 0x1000), low.clone()).unwrap();
    iommu.map(span(0x11000, 0x1000), high.clone()).unwrap();
    let bytes: Vec<u8> = (0..0x1000_u32).map(|i| (i % 251) as u8).collect();
    low.copy_from(0x804, &bytes[..0x7fc]);
    high.copy_from(0, &bytes[0x7fc..]);

    let write = host.run(&mut pair, Sqe::rw(1, 0, 8).prps(Iova(0x10804), Iova(0x11000)));
    let data = host.buffer(4096);
    let read = host.run(&mut pair, Sqe::rw(2, 0, 8).prps(data.span().start(), Iova(0)));

    assert_eq!((write.status, read.status), (0, 0));
    let mut found = vec![0; 0x1000];
    data.memory().copy_to(0, &mut found);
    // PRP1 covers 0x7fc bytes; the rest comes from PRP2.
    assert_eq!(found, bytes);
}

#[test]
fn a_large_controller_page_may_cross_mappings() {
    // With CC.MPS at 8 KiB, one page covers two mappings of 4 KiB.
    let host = Host::disabled(small());
    host.function.set_bus_master(true).unwrap();
    let admin = host.buffer(0x10000);
    let base = admin.span().start().raw().next_multiple_of(0x2000);
    host.bar.write32(0x24, 3 << 16 | 3);
    host.bar.write64(0x28, base);
    host.bar.write64(0x30, base + 0x2000);
    host.bar.write32(0x14, 1 | 1 << 7 | 6 << 16 | 4 << 20);
    let (low, high) = (shared(0x1000), shared(0x1000));
    host.machine.iommu().map(span(0x10000, 0x1000), low.clone()).unwrap();
    host.machine.iommu().map(span(0x11000, 0x1000), high.clone()).unwrap();
    let sqe = Sqe::new(6).dword(10, 1).prps(Iova(0x10800), Iova(0));

    let offset = (base - admin.span().start().raw()) as usize;
    admin.memory().copy_from(offset, &sqe.0);
    host.bar.write32(0x1000, 1);

    assert_eq!(admin.memory().read_u16(offset + 0x2000 + 14), 1, "success, first phase");
    assert_eq!(low.read_u8(0x800 + 512), 0x66);
    assert_eq!(high.read_u8(0), 0, "byte 2048 of Identify Controller is zero");
    assert_eq!(host.machine.iommu().fault_count(), 0);
}
