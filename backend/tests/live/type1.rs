//! The same function through its group and a container. `VDV_REGIME` does not matter: each test names its own.

use std::fs;
use std::io;
use std::sync::Arc;

use vhost_device_vfio::acquire::AcquiredFunction;
use vhost_device_vfio::acquire::hand_over::Served;
use vhost_device_vfio::addr::{Gpa, Iova, Qva, Span};
use vhost_device_vfio::coherency::{Personality, Policy};
use vhost_device_vfio::hardware::{AddressSpace, Function, InterruptKind, MapError, SpaceStatistics};
use vhost_device_vfio::iommu::Type1Space;
use vhost_device_vfio::memory::{Region, RegionSpec};
use vhost_device_vfio::sys::{CacheLines, Container};
use vhost_device_vfio::vfio::{Attached, InterfaceChoice, Opened, VfioError};

use super::{MIB, device, memory};

/// Bytes.
fn page() -> u64 {
    rustix::param::page_size() as u64
}

fn join() -> Result<(Attached, Container), VfioError> {
    let opened = Opened::open(device())?;
    let container = opened.open_container()?;
    Ok((opened.attach_by_group(&container)?, container))
}

fn space(flushing: bool) -> (Attached, Type1Space) {
    let (function, container) = join().unwrap();
    let lines = flushing.then(|| CacheLines::detect().expect("cache ops"));
    (function, Type1Space::new(container, lines).unwrap())
}

/// Memory of this process that the kernel counts as locked (`VmLck`): type 1 counts what it pins. Bytes.
fn pinned() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("VmLck in status");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn the_statistics_and_the_kernel_agree_on_the_pinned_memory() {
    let (_function, space) = space(false);
    let check = || assert_eq!(space.statistics().mapped, pinned());
    let (low, high) = (memory(0, 8 * MIB), memory(0x1_0000_0000, 4 * MIB));

    let buffer = space.buffer(5000).unwrap();
    space.add(&low).unwrap();
    space.add(&high).unwrap();
    check();
    assert!(space.add(&memory(4 * MIB, 8 * MIB)).is_err());
    check();
    space.remove(&low).unwrap();
    check();
    drop(buffer);
    space.remove(&high).unwrap();

    assert_eq!(pinned(), 0);
}

#[test]
fn a_flushing_space_flushes_every_byte_after_the_map_and_before_the_unmap_without_staging() {
    let (_function, space) = space(true);
    let region = memory(0, 8 * MIB);
    space.add(&region).unwrap();
    space.remove(&region).unwrap();

    let SpaceStatistics { staged, flushed_at_map, flushed_at_unmap, .. } = space.statistics();
    assert_eq!((staged, flushed_at_map, flushed_at_unmap), (0, 8 * MIB, 8 * MIB));
    assert_eq!(space.order(), "mapped, flushed, published");
}

#[test]
fn where_memory_must_be_flushed_before_the_map_nothing_is_mapped() {
    let (_function, space) = space(true);
    space.require_flush_before_map();

    let error = space.add(&memory(0, 4 * MIB)).unwrap_err();

    assert!(error.to_string().contains("flush before the device can reach it"), "{error}");
    assert_eq!((pinned(), space.statistics().mapped), (0, 0));
}

/// Where devices send their interrupts: the local APICs' addresses, or the window that Linux reserves for the doorbells of Arm's
/// interrupt controllers.
const INTERRUPTS: u64 = if cfg!(target_arch = "aarch64") { 0x0800_0000 } else { 0xfee0_0000 };

#[test]
fn memory_outside_the_allowed_ranges_is_refused_without_a_map() {
    let (_function, space) = space(false);
    let error = space.add(&memory(INTERRUPTS - MIB, 2 * MIB)).unwrap_err();
    assert!(matches!(error, MapError::NotAllowed { .. }), "{error}");
    assert_eq!(pinned(), 0);
}

#[test]
fn memory_of_a_file_for_reading_is_mapped_for_reading_and_never_for_writing() {
    let (_function, container) = join().unwrap();
    let file = memory(0, MIB);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file.file()));
    let spec =
        RegionSpec { gpa: file.gpa(), qva: file.qva().start(), offset: 0, file: fs::File::open(path).unwrap().into() };
    let rom = Region::map_piece(spec, false).unwrap();
    let span = rom.iova();

    let for_writing = container.map((rom.memory(), 0), span, true).unwrap_err();
    container.map((rom.memory(), 0), span, false).unwrap();
    let while_mapped = pinned();
    container.unmap(span).unwrap();

    assert_eq!((for_writing.raw_os_error(), while_mapped, pinned()), (Some(libc::EFAULT), MIB, 0));
}

#[test]
fn a_region_that_cuts_a_page_of_this_host_is_refused_with_its_size() {
    let file = memory(0, MIB).file().try_clone().unwrap();
    let gpa = Span::new(Gpa(MIB + page() / 4), MIB / 2).unwrap();

    let spec = RegionSpec { gpa, qva: Qva(0), offset: 0, file: file.into() };
    let refused = Region::map_piece(spec, true).err().expect("refused").to_string();

    assert!(refused.contains(&format!("page size of {}K", page() >> 10)), "{refused}");
}

#[test]
fn an_unmap_is_exact() {
    let (_function, container) = join().unwrap();
    let region = memory(0, MIB);
    let (whole, half) = (region.iova(), Span::new(Iova(0), MIB / 2).unwrap());
    container.map((region.memory(), 0), whole, true).unwrap();

    let a_half = container.unmap(half).unwrap_err();
    let elsewhere = container.unmap(Span::new(Iova(MIB), MIB).unwrap()).unwrap_err();

    assert_eq!((a_half.raw_os_error(), elsewhere.raw_os_error()), (Some(libc::EINVAL), Some(libc::ENOENT)));
    assert_eq!(pinned(), MIB);
    container.unmap(whole).unwrap();
}

#[test]
fn more_mappings_than_the_kernel_allows_are_refused_with_the_parameter() {
    const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    let former = fs::read_to_string(LIMIT).unwrap();
    fs::write(LIMIT, "2").unwrap();
    let (_function, space) = space(false);
    fs::write(LIMIT, former.trim()).unwrap();
    let _two = (space.buffer(1).unwrap(), space.buffer(1).unwrap());

    let error = space.add(&memory(0, MIB)).unwrap_err();

    assert!(matches!(error, MapError::TooManyMappings { needed: 1, left: 0, .. }), "{error}");
    assert!(error.to_string().contains("vfio_iommu_type1.dma_entry_limit"), "{error}");
    assert_eq!(pinned(), 2 * page());
}

#[test]
fn a_released_space_pins_nothing_and_maps_all_its_memory_when_the_function_is_back() {
    for flushing in [false, true] {
        let (function, space) = space(flushing);
        let (first, second) = (memory(0, 4 * MIB), memory(0x1_0000_0000, 2 * MIB));
        space.add(&first).unwrap();
        let _buffer = space.buffer(4096).unwrap();

        space.release();
        drop(function);
        assert!(space.is_released());
        assert_eq!(pinned(), 0);
        space.add(&second).unwrap();
        let flushed = space.statistics().flushed_at_map;
        let (_function, container) = join().unwrap();
        space.rejoin(container).unwrap();

        assert!(!space.is_released());
        assert_eq!(pinned(), 6 * MIB + page());
        assert_eq!(space.statistics().flushed_at_map, flushed, "what is mapped again is flushed, but counted once");
        space.remove(&first).unwrap();
        space.remove(&second).unwrap();
    }
}

#[test]
fn dropping_the_function_and_its_space_unpins_all_memory_and_releases_the_group() {
    let (function, space) = space(false);
    space.add(&memory(0, 16 * MIB)).unwrap();

    drop((space, function));

    assert_eq!(pinned(), 0);
    join().expect("the group is free again");
}

#[test]
fn the_function_is_accessible_and_has_bus_master_off() {
    let (function, _container) = join().unwrap();
    let (mut class, mut command) = ([0; 3], [0; 2]);
    function.config_read(0x09, &mut class).unwrap();
    function.config_read(0x04, &mut command).unwrap();

    assert_eq!(class, [0x02, 0x08, 0x01], "class code of an NVMe controller, lowest byte first");
    assert_eq!(u16::from_le_bytes(command) & 0b100, 0, "Bus Master Enable");
    assert_ne!(function.registers(0).unwrap().read64(0), u64::MAX, "CAP");
    assert_eq!(function.registers(3).err().map(|e| e.kind()), Some(io::ErrorKind::NotFound));
    assert!(function.vectors(InterruptKind::MsiX) > 1);
    function.set_bus_master(true).unwrap();
    function.reset().unwrap();
    function.config_read(0x04, &mut command).unwrap();
    assert_eq!(u16::from_le_bytes(command) & 0b110, 0b010, "after a reset");
}

#[test]
fn a_function_in_a_container_is_not_handed_over_and_can_be_used_afterwards() {
    let acquired = AcquiredFunction::acquire(device(), InterfaceChoice::Type1).unwrap();
    let facts = acquired.evidence().facts(Personality::Mediated, Policy::Suppress, false);
    let (function, space) = acquired.into_address_space(&facts).unwrap();
    let function = Arc::new(function);
    let served = Served::new(device().into(), &function, &space, &facts);

    let error = served.export(true).map(drop).unwrap_err().to_string();

    assert!(error.contains("with VFIO type1 memory stays pinned only as long as this process lives"), "{error}");
    drop(space.address_space().buffer(4096).unwrap());
}

#[test]
fn a_group_in_use_is_refused() {
    let _in_use = join().unwrap();
    let error = join().err().expect("it is in use");
    assert!(matches!(error, VfioError::InUse { .. }), "{error}");
}
