//! Guest memory: what is mapped and what is refused. A refusal changes nothing.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};

use crate::rig::{Rig, memory};

const READ: u32 = 1;
const WRITE: u32 = 2;
const UNMAP_ALL: u32 = 2;

const EACCES: u32 = 13;
const EINVAL: u32 = 22;
const EEXIST: u32 = 17;
const ENOENT: u32 = 2;

#[test]
fn pieces_of_one_file_are_mapped_and_unmapped_one_by_one() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(16 << 20);

    client.dma_map((0, 0xc_0000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
    client.dma_map((0x10_0000, 15 << 20), (Some(file.as_fd()), 0x10_0000), READ | WRITE).unwrap();
    assert_eq!(rig.mapped(), 0xc_0000 + (15 << 20));
    client.dma_unmap(0, 0xc_0000, 0).unwrap();
    assert_eq!(rig.mapped(), 15 << 20);
    client.dma_map((0, 0xd_0000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();

    assert_eq!(rig.mapped(), 0xd_0000 + (15 << 20));
}

#[test]
fn all_can_be_unmapped_at_once() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(1 << 20);
    for n in 0..4 {
        client.dma_map((n << 20, 1 << 20), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
    }

    client.dma_unmap(0, 0, UNMAP_ALL).unwrap();

    assert_eq!(rig.mapped(), 0);
    client.dma_map((0, 1 << 20), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
}

#[test]
fn an_overlap_is_refused_with_eexist_and_nothing_changes() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(1 << 20);
    client.dma_map((0x10_0000, 0x1_0000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();

    for address in [0x10_0000, 0xf_f000, 0x10_f000, 0x10_4000] {
        let refused = client.dma_map((address, 0x2000), (Some(file.as_fd()), 0), READ | WRITE);
        assert_eq!(refused.unwrap_err(), EEXIST, "{address:#x}");
    }

    assert_eq!(rig.mapped(), 0x1_0000);
    client.dma_unmap(0x10_0000, 0x1_0000, 0).unwrap();
}

#[test]
fn a_range_that_cuts_through_a_mapping_is_refused_and_nothing_changes() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(1 << 20);
    for address in [0x10_0000, 0x10_2000] {
        client.dma_map((address, 0x2000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
    }

    for (address, size) in [(0x10_0000, 0x1000), (0x10_1000, 0x1000), (0x10_0000, 0x3000), (0xf_f000, 0x4000)] {
        assert_eq!(client.dma_unmap(address, size, 0).unwrap_err(), EINVAL, "{address:#x} + {size:#x}");
    }

    assert_eq!(rig.mapped(), 0x4000);
}

#[test]
fn a_range_in_which_nothing_is_mapped_is_enoent() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(1 << 20);
    client.dma_map((0x10_0000, 0x2000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();

    for (address, size) in [(0x10_2000, 0x1000), (0xf_e000, 0x2000), (0, 0), (u64::MAX, 2)] {
        assert_eq!(client.dma_unmap(address, size, 0).unwrap_err(), ENOENT, "{address:#x} + {size:#x}");
    }

    assert_eq!(rig.mapped(), 0x2000);
}

#[test]
fn a_range_is_unmapped_with_all_mappings_in_it_as_behind_a_virtual_iommu() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(1 << 20);
    for address in [0x10_0000, 0x10_2000, 0x40_0000, 0x100_0000] {
        client.dma_map((address, 0x2000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
    }
    // Recorded only, like a ROM.
    client.dma_map((0x50_0000, 0x1000), (None, 0), READ).unwrap();

    client.dma_unmap(0x10_0000, 0xe0_0000, 0).unwrap();

    assert_eq!(rig.mapped(), 0x2000, "the one outside");
    for address in [0x10_0000, 0x10_1000, 0x40_0000, 0x50_0000] {
        client.dma_map((address, 0x1000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
    }
    client.dma_unmap(0, 1 << 63, 0).unwrap();
    assert_eq!(rig.mapped(), 0);
}

#[test]
fn memory_without_a_file_is_recorded_but_not_mapped() {
    let rig = Rig::new();
    let mut client = rig.client();

    client.dma_map((0xfffc_0000, 0x4_0000), (None, 0), READ).unwrap();
    client.dma_map((0xe000_0000, 0x1000), (None, 0), READ | WRITE).unwrap();

    assert_eq!(rig.mapped(), 0);
    assert_eq!(client.dma_map((0xe000_0000, 0x1000), (None, 0), READ).unwrap_err(), EEXIST);
    client.dma_unmap(0xfffc_0000, 0x4_0000, 0).unwrap();
}

#[test]
fn ram_that_is_not_shared_is_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.dma_map((0, 256 << 20), (None, 0), READ | WRITE).unwrap_err(), EINVAL);
}

#[test]
fn invalid_mappings_are_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(0x1_0000);
    let pipe = rustix::pipe::pipe().unwrap().0;
    let whole = (Some(file.as_fd()), 0);

    let refusals = [
        ("past the end of the file", client.dma_map((0, 0x2_0000), whole, READ | WRITE)),
        ("from past the end", client.dma_map((0, 0x1000), (Some(file.as_fd()), 0x1_0000), READ | WRITE)),
        ("an offset within a page", client.dma_map((0, 0x1000), (Some(file.as_fd()), 0x800), READ | WRITE)),
        ("an offset that overflows", client.dma_map((0, 0x1000), (Some(file.as_fd()), u64::MAX - 0xfff), READ | WRITE)),
        ("an address within a page", client.dma_map((0x800, 0x1000), whole, READ | WRITE)),
        ("a size within a page", client.dma_map((0, 0x800), whole, READ | WRITE)),
        ("no size", client.dma_map((0x1000, 0), whole, READ | WRITE)),
        ("past the end of the address space", client.dma_map((u64::MAX - 0xfff, 0x2000), whole, READ | WRITE)),
        ("a pipe", client.dma_map((0, 0x1000), (Some(pipe.as_fd()), 0), READ | WRITE)),
    ];

    for (name, result) in refusals {
        assert_eq!(result.unwrap_err(), EINVAL, "{name}");
    }
    assert_eq!(rig.mapped(), 0);
    client.dma_map((0, 0x1_0000), whole, READ | WRITE).unwrap();
}

#[test]
fn memory_that_the_front_end_maps_privately_is_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = privately_mapped_file();

    let refused = client.dma_map((0, 0x1000), (Some(file.0.as_fd()), 0), READ | WRITE);

    assert_eq!(refused.unwrap_err(), EINVAL);
}

/// A file that this process, which is the front-end, has mapped privately.
fn privately_mapped_file() -> (std::fs::File, vm_memory::MmapRegion<()>) {
    let file = std::fs::File::from(memfd_create("private", MemfdFlags::CLOEXEC).unwrap());
    rustix::fs::ftruncate(&file, 0x1000).unwrap();
    let offset = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let region = vm_memory::MmapRegion::build(Some(offset), 0x1000, libc::PROT_READ | libc::PROT_WRITE, flags);
    (file, region.unwrap())
}

#[test]
fn memory_may_be_of_a_file_that_can_only_be_read_if_the_device_only_reads_it() {
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(0x1000);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let rom = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();

    client.dma_map((0x8000_0000, 0x1000), (Some(rom.as_fd()), 0), READ).unwrap();

    assert_eq!(rig.mapped(), 0x1000);
    let writable = client.dma_map((0x9000_0000, 0x1000), (Some(rom.as_fd()), 0), READ | WRITE);
    assert_eq!(writable.unwrap_err(), EACCES);
    client.dma_map((0x9000_0000, 0x1000), (Some(file.as_fd()), 0), READ | WRITE).unwrap();
}

#[test]
fn a_file_that_is_not_in_memory_is_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    let program = std::fs::File::open("/proc/self/exe").unwrap();

    assert_eq!(client.dma_map((0, 0x1000), (Some(program.as_fd()), 0), READ).unwrap_err(), EINVAL);

    assert_eq!(rig.mapped(), 0);
}

#[test]
fn read_only_memory_is_not_written_by_the_device() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = crate::nvme::guest(&mut client);
    let rom = memory(0x1000);
    client.dma_map((0x80_0000, 0x1000), (Some(rom.as_fd()), 0), READ).unwrap();
    crate::nvme::enable(&mut client);

    crate::nvme::identify(&mut client, &guest, 0, 0x80_0000);
    rig.wait_until(|_| crate::nvme::completion(&guest, 0).is_some());

    let (_, status) = crate::nvme::completion(&guest, 0).unwrap();
    assert_eq!(status & 0x7ff, 0x04, "Data Transfer Error (NVMe 2.0, Figure 94)");
    let mut bytes = [0xff; 16];
    std::os::unix::fs::FileExt::read_exact_at(&*rom, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 16]);
}
