//! Tests of the `iommu` and `vfio` modules on a real kernel, with iommufd and a VFIO function.
//!
//! They need a machine with an IOMMU and a function bound to vfio-pci, named in `VDV_DEVICE`. So `cargo test` leaves them out,
//! and `scripts/test` runs them in the testbed, one at a time, because a function has one owner.

#[path = "live/hand_over.rs"]
mod hand_over;
#[path = "live/second.rs"]
mod second;
#[path = "live/type1.rs"]
mod type1;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Iova, Qva, Span};
use vhost_device_vfio::hardware::{AddressSpace, Function, InterruptKind, MapError, SpaceStatistics};
use vhost_device_vfio::iommu::{LiveSpace, PageTable};
use vhost_device_vfio::memory::{Region, RegionSpec};
use vhost_device_vfio::sys::CacheLines;
use vhost_device_vfio::vfio::{Attached, Opened, PciAddress, VfioError, open_iommufd};

const MIB: u64 = 1 << 20;
/// The start of a range that interrupts have, on an x86 host and behind an `SMMUv3` (`MSI_IOVA_BASE` in Linux).
const INTERRUPTS: u64 = if cfg!(target_arch = "aarch64") { 0x0800_0000 } else { 0xfee0_0000 };

/// The page size of this host, bytes.
fn page() -> u64 {
    rustix::param::page_size() as u64
}

fn device() -> PciAddress {
    std::env::var("VDV_DEVICE").expect("VDV_DEVICE names the function under test").parse().expect("a PCI address")
}

fn attach() -> Result<(LiveSpace, Attached), VfioError> {
    attach_with(std::env::var("VDV_REGIME").is_ok_and(|regime| regime == "flushing"))
}

fn attach_with(flushing: bool) -> Result<(LiveSpace, Attached), VfioError> {
    let iommufd = Arc::new(open_iommufd(Path::new("/dev/iommu"))?);
    let ioas = iommufd.alloc_ioas().expect("an address space");
    let bound = Opened::open(device())?.bind(&iommufd, &ioas)?;
    let table = Arc::new(PageTable::new(iommufd, ioas, bound.device_id()).expect("a page table"));
    let attached = bound.attach(Arc::clone(&table))?;
    let space = if flushing {
        let lines = CacheLines::detect().expect("cache ops");
        LiveSpace::flushing(&table, lines, attached.device_file()).expect("staging")
    } else {
        LiveSpace::coherent(&table, attached.device_file())
    };
    Ok((space, attached))
}

fn memory(gpa: u64, bytes: u64) -> Arc<Region> {
    let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
    ftruncate(&file, bytes).unwrap();
    let spec = RegionSpec {
        gpa: Span::new(Gpa(gpa), bytes).unwrap(),
        qva: Qva(0x7f00_0000_0000),
        offset: 0,
        file: file.into(),
    };
    Arc::new(Region::map(spec).unwrap())
}

/// Pinned memory of this process, bytes (`VmPin`).
fn pinned() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).expect("VmPin in status");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn an_added_region_is_pinned_once_and_unpinned_when_it_is_removed() {
    let (space, _function) = attach().unwrap();
    let region = memory(0x1_0000_0000, 64 * MIB);
    let before = pinned();

    space.add(&region).unwrap();
    let while_added = pinned();
    space.remove(&region).unwrap();

    assert_eq!(while_added - before, 64 * MIB);
    assert_eq!(pinned(), before);
}

#[test]
fn the_statistics_and_the_kernel_agree_on_the_pinned_memory() {
    let start = pinned();
    let (space, _function) = attach().unwrap();
    let check = || assert_eq!(space.statistics().mapped, pinned() - start);
    let (low, high) = (memory(0, 8 * MIB), memory(0x1_0000_0000, 4 * MIB));

    check();
    let buffer = space.buffer(5000).unwrap();
    space.add(&low).unwrap();
    check();
    space.add(&high).unwrap();
    check();
    assert!(space.add(&memory(4 * MIB, 8 * MIB)).is_err());
    check();
    space.remove(&low).unwrap();
    check();
    drop(buffer);
    check();
    space.remove(&high).unwrap();
    check();
}

#[test]
fn a_coherent_space_stages_and_flushes_nothing() {
    let (space, _function) = attach_with(false).unwrap();
    let region = memory(0, 8 * MIB);
    space.add(&region).unwrap();
    drop(space.buffer(8192).unwrap());
    space.remove(&region).unwrap();

    let SpaceStatistics { maps, staged, flushed_at_map, flushed_at_unmap, flush_time, .. } = space.statistics();
    assert_eq!((maps, staged, flushed_at_map, flushed_at_unmap), (2, 0, 0, 0));
    assert_eq!(flush_time, Duration::ZERO);
    assert!(space.caches().is_none());
}

#[test]
fn a_flushing_space_flushes_every_byte_once_at_map_and_once_at_unmap() {
    let (space, _function) = attach_with(true).unwrap();
    let region = memory(0, 8 * MIB);
    space.add(&region).unwrap();
    space.remove(&region).unwrap();

    let SpaceStatistics { staged, flushed_at_map, flushed_at_unmap, .. } = space.statistics();
    assert_eq!((staged, flushed_at_map, flushed_at_unmap), (2, 8 * MIB, 8 * MIB));
    assert_eq!(space.order(), "pinned, flushed, mapped");
}

/// Calls `change` while the kernel's `n`th fault-injection point fails (Linux: fault-injection, `fail-nth`).
fn failing<T>(n: u32, change: impl FnOnce() -> T) -> T {
    let arm = |n: u32| std::fs::write("/proc/thread-self/fail-nth", n.to_string());
    arm(n).expect("a kernel with fault injection");
    let result = change();
    arm(0).expect("a kernel with fault injection");
    result
}

#[test]
fn without_kernel_memory_for_the_copy_a_region_is_removed_while_the_device_is_idle() {
    let (space, function) = attach_with(true).unwrap();
    let (region, other) = (memory(0, 8 * MIB), memory(0x1_0000_0000, 4 * MIB));
    let before = pinned();
    space.add(&region).unwrap();
    space.add(&other).unwrap();

    // The first fault-injection points are lookups of iommufd objects, whose failure is final.
    let out_of_memory = |n| match failing(n, || space.remove(&region)) {
        Err(MapError::DeviceMustBeIdle { .. }) => true,
        Err(_) => false,
        Ok(()) => panic!("it was removed without a failed allocation of the copy"),
    };
    assert!((1..).any(out_of_memory));
    let still = pinned();
    space.remove_while_idle(&region).unwrap();

    assert_eq!((still - before, pinned() - before), (12 * MIB, 4 * MIB));
    assert_eq!(space.statistics().flushed_at_unmap, 8 * MIB);
    // The device is attached again: regions can be added and removed, and the function can be released and attached.
    space.add(&region).unwrap();
    space.remove(&region).unwrap();
    space.remove(&other).unwrap();
    drop((space, function));
    attach().expect("the function is free again");
}

#[test]
fn without_kernel_memory_for_the_final_map_a_region_is_unpinned_again() {
    let (space, _function) = attach_with(true).unwrap();
    let region = memory(0, 4 * MIB);
    let before = pinned();
    let mut failed = Vec::new();
    for n in 1.. {
        match failing(n, || space.add(&region)) {
            // The last step needs no memory, so it is the end of the loop.
            Ok(()) | Err(MapError::Kernel { step: "release the staging mapping of", .. }) => break,
            Err(MapError::Kernel { step, source, .. }) => {
                assert_eq!((pinned(), space.statistics().mapped), (before, 0), "{step}: {source}");
                failed.push((step, source.raw_os_error()));
            }
            Err(other) => panic!("{other}"),
        }
    }
    for step in ["pin for DMA", "map for DMA after the flush"] {
        assert!(failed.contains(&(step, Some(libc::ENOMEM))), "{step}: {failed:?}");
    }
}

#[test]
fn a_region_over_the_interrupt_window_is_refused_without_a_system_call() {
    let (space, _function) = attach().unwrap();
    let before = pinned();

    let error = space.add(&memory(INTERRUPTS - MIB, 2 * MIB)).unwrap_err();

    assert!(matches!(error, MapError::NotAllowed { .. }), "{error}");
    assert_eq!(pinned(), before);
}

#[test]
fn an_overlapping_region_is_refused_and_the_first_stays_mapped() {
    let (space, _function) = attach().unwrap();
    space.add(&memory(0, 4 * MIB)).unwrap();
    let before = pinned();

    let error = space.add(&memory(2 * MIB, 4 * MIB)).unwrap_err();

    assert!(matches!(error, MapError::Overlap { taken, .. } if taken.len() == 4 * MIB), "{error}");
    assert_eq!(pinned(), before);
}

#[test]
fn a_region_that_was_never_added_cannot_be_removed() {
    let (space, _function) = attach().unwrap();
    let error = space.remove(&memory(0, 4 * MIB)).unwrap_err();
    assert!(matches!(error, MapError::NotMapped { .. }), "{error}");
}

#[test]
fn buffers_are_above_guest_memory_and_unmapped_when_dropped() {
    let (space, _function) = attach().unwrap();
    let before = pinned();

    let first = space.buffer(1).unwrap();
    let second = space.buffer(8192).unwrap();
    let (high, low) = (first.span(), second.span());

    assert!(low.start() > Iova(1 << 38), "{low}");
    assert!(!high.overlaps(&low));
    let wanted = [page(), 8192_u64.next_multiple_of(page())];
    assert_eq!([high.len(), low.len()], wanted);
    assert_eq!(pinned() - before, wanted.iter().sum::<u64>());
    drop((first, second));
    assert_eq!(pinned(), before);
}

#[test]
fn dropping_the_function_and_its_space_unpins_all_memory_and_releases_the_function() {
    let before = pinned();
    let (space, function) = attach().unwrap();
    space.add(&memory(0, 16 * MIB)).unwrap();

    drop((space, function));

    assert_eq!(pinned(), before);
    attach().expect("the function is free again");
}

#[test]
fn the_function_is_accessible_and_has_bus_master_off() {
    let (_space, function) = attach().unwrap();
    let (mut class, mut command) = ([0; 3], [0; 2]);
    function.config_read(0x09, &mut class).unwrap();
    function.config_read(0x04, &mut command).unwrap();

    assert_eq!(class, [0x02, 0x08, 0x01], "class code of an NVMe controller, lowest byte first");
    assert_eq!(u16::from_le_bytes(command) & 0b100, 0, "Bus Master Enable");
    assert_ne!(function.registers(0).unwrap().read64(0), u64::MAX, "CAP");
    assert!(function.vectors(InterruptKind::MsiX) > 1);
}

#[test]
fn a_reset_leaves_bus_master_off_and_memory_decoding_on() {
    let (_space, function) = attach().unwrap();
    function.set_bus_master(true).unwrap();

    function.reset().unwrap();

    let mut command = [0; 2];
    function.config_read(0x04, &mut command).unwrap();
    assert_eq!(u16::from_le_bytes(command) & 0b110, 0b010);
}

#[test]
fn a_bar_that_does_not_exist_is_not_found() {
    let (_space, function) = attach().unwrap();
    assert_eq!(function.registers(3).err().map(|e| e.kind()), Some(io::ErrorKind::NotFound));
}

#[test]
fn a_function_in_use_is_refused() {
    let (_space, _function) = attach().unwrap();
    let error = attach().err().expect("it is in use");
    assert!(matches!(error, VfioError::InUse { .. }), "{error}");
}

#[test]
fn a_function_that_does_not_exist_is_refused() {
    let error = Opened::open("ffff:00:00.0".parse().unwrap()).err().expect("it does not exist");
    assert!(matches!(error, VfioError::NoSuchFunction(_)), "{error}");
}

#[test]
fn a_missing_iommufd_is_an_error_of_its_own() {
    let error = open_iommufd(Path::new("/dev/no-such-iommu")).err().expect("it does not exist");
    assert!(matches!(error, VfioError::NoIommufd { .. }), "{error}");
}
