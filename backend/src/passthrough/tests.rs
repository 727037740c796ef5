//! Passthrough of the emulated function: what the guest can access of configuration space, memory and interrupts, and the
//! order of the teardown. Tests over the socket are in `tests/vfio_user`.

mod handed_out;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::addr::Iova;
use crate::coherency::{NoSnoop, Personality, Policy};
use crate::emulated::{Machine, Options};
use crate::hardware::{DmaBuffer, Function, InterruptKind, MapError, Registers, SpaceStatistics};
use crate::memory::Region;
use crate::whole_function::{IrqAction, IrqData, IrqInfo, IrqSet, RegionInfo, RegionMmap};

const DEVICE_CONTROL_HIGH: u16 = 0x59;
const NO_SNOOP: u8 = 1 << 3;
const FUNCTION_LEVEL_RESET: u8 = 1 << 7;
const COMMAND: u16 = 0x04;
const BUS_MASTER: u8 = 1 << 2;
const MSIX: u32 = 2;

/// A function that can set No Snoop, behind an IOMMU that does not enforce snooping.
fn machine() -> Machine {
    Machine::new(Options { size: 1 << 20, no_snoop: true, snoop_enforced: false, ..Options::default() }).unwrap()
}

fn passthrough(machine: &Machine, policy: Policy) -> Passthrough {
    recorded(machine, policy, &Events::default())
}

/// The same; `events` records the calls to function and address space.
fn recorded(machine: &Machine, policy: Policy, events: &Events) -> Passthrough {
    let facts = Facts { personality: Personality::WholeFunction, ..machine.facts(policy).unwrap() };
    let space = if policy == Policy::Suppress { machine.space() } else { machine.staged_space() };
    let function = Recorder { inner: machine.whole_function(), events: Arc::clone(events) };
    let space = Recorder { inner: space, events: Arc::clone(events) };
    Passthrough::new(Arc::new(function), Arc::new(space), BarAccess::Direct, facts, false).unwrap()
}

/// The recorded calls, in order.
type Events = Arc<Mutex<Vec<&'static str>>>;

fn take(events: &Events) -> Vec<&'static str> {
    std::mem::take(&mut events.lock().unwrap())
}

/// Records each call, and forwards it.
struct Recorder<T: ?Sized> {
    events: Events,
    inner: Arc<T>,
}

impl<T: ?Sized> Recorder<T> {
    fn record(&self, event: &'static str) {
        self.events.lock().unwrap().push(event);
    }
}

impl Function for Recorder<dyn WholeFunction> {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.config_read(offset, bytes)
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        if offset == COMMAND && bytes[0] & BUS_MASTER != 0 {
            let mut high = [0];
            self.inner.config_read(DEVICE_CONTROL_HIGH, &mut high)?;
            self.record(if high[0] & NO_SNOOP == 0 { "bus master on" } else { "bus master on, with No Snoop" });
        }
        self.inner.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.inner.registers(bar)
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.inner.vectors(kind)
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.inner.route_vectors(kind, events)
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.record(if on { "bus master on" } else { "bus master off" });
        self.inner.set_bus_master(on)
    }
    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.route_removal(event)
    }
    fn reset(&self) -> io::Result<()> {
        self.record("reset");
        self.inner.reset()
    }
}

impl WholeFunction for Recorder<dyn WholeFunction> {
    fn region(&self, index: u32) -> RegionInfo {
        self.inner.region(index)
    }
    fn region_mmap(&self, index: u32) -> io::Result<Option<RegionMmap>> {
        self.inner.region_mmap(index)
    }
    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.region_read(index, offset, bytes)
    }
    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.inner.region_write(index, offset, bytes)
    }
    fn resettable(&self) -> bool {
        self.inner.resettable()
    }
    fn irq(&self, index: u32) -> IrqInfo {
        self.inner.irq(index)
    }
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        self.record(if set.count == 0 { "interrupts off" } else { "interrupts on" });
        self.inner.set_irqs(set)
    }
}

impl AddressSpace for Recorder<dyn AddressSpace> {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.record(if region.writable() { "map" } else { "map read-only" });
        self.inner.add(region)
    }
    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.record("unmap");
        self.inner.remove(region)
    }
    fn require_flush_before_map(&self) {
        self.inner.require_flush_before_map();
    }
    fn statistics(&self) -> SpaceStatistics {
        self.inner.statistics()
    }
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        self.inner.buffer(bytes)
    }
}

/// Enable No Snoop in the function itself.
fn physical(machine: &Machine) -> u8 {
    let mut byte = [0];
    machine.function().config_read(DEVICE_CONTROL_HIGH, &mut byte).unwrap();
    byte[0] & NO_SNOOP
}

fn set_physical(machine: &Machine) {
    machine.function().config_write(DEVICE_CONTROL_HIGH, &[NO_SNOOP]).unwrap();
}

fn memory(bytes: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, bytes).unwrap();
    file
}

fn map(file: &File, address: u64, size: u64, writable: bool) -> DmaMap {
    DmaMap { address, size, offset: 0, writable, file: Some(file.try_clone().unwrap()) }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Sets the eventfd of vector 0 of an interrupt.
fn eventfds(index: u32) -> IrqSet<'static> {
    IrqSet { index, start: 0, count: 1, action: IrqAction::Trigger, data: IrqData::Eventfds(&[]) }
}

/// Waits until `event` is signalled; false if it is not in 10 s.
fn signalled(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })) == Ok(1)
}

#[test]
fn a_guest_can_neither_set_nor_see_a_disabled_bit() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Suppress);
    let assignment = device.assign().unwrap();

    assignment.config.write(DEVICE_CONTROL_HIGH - 1, &mut [0, NO_SNOOP]).unwrap();
    assert_eq!(physical(&machine), 0);
    set_physical(&machine);
    let mut seen = [0; 4];
    assignment.config.read(DEVICE_CONTROL_HIGH - 1, &mut seen).unwrap();

    assert_eq!(seen[1] & NO_SNOOP, 0);
}

#[test]
fn a_bit_that_was_hardwired_when_it_was_probed_is_masked_as_well() {
    let machine = machine();
    let facts = machine.facts(Policy::Allow).unwrap();
    let facts = Facts { personality: Personality::WholeFunction, no_snoop: NoSnoop::NeverSet, ..facts };
    let device = Passthrough::new(machine.whole_function(), machine.space(), BarAccess::Direct, facts, false).unwrap();
    let assignment = device.assign().unwrap();

    assignment.config.write(DEVICE_CONTROL_HIGH, &mut [NO_SNOOP]).unwrap();

    assert_eq!(physical(&machine), 0, "the guest has loaded firmware that implements the bit");
}

#[test]
fn a_bit_that_a_reset_sets_is_cleared_again() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Suppress);
    let assignment = device.assign().unwrap();
    assert_eq!(physical(&machine), 0, "at the start");

    assignment.reset().unwrap();
    assert_eq!(physical(&machine), 0, "after VFIO_USER_DEVICE_RESET");
    assignment.config.write(DEVICE_CONTROL_HIGH, &mut [FUNCTION_LEVEL_RESET]).unwrap();

    assert_eq!(physical(&machine), 0, "after a Function Level Reset by the guest");
}

#[test]
fn a_bit_that_is_set_at_a_reset_that_fails_is_cleared_again() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Suppress);
    let assignment = device.assign().unwrap();
    set_physical(&machine);
    machine.inject(crate::emulated::Fault::ResetRefused);

    assert!(assignment.reset().is_err());

    assert_eq!(physical(&machine), 0);
}

#[test]
fn bus_master_is_turned_on_only_with_the_bit_clear() {
    let (machine, events) = (machine(), Events::default());
    let device = recorded(&machine, Policy::Suppress, &events);
    let assignment = device.assign().unwrap();
    set_physical(&machine);
    take(&events);

    assignment.config.write(COMMAND, &mut [0b010 | BUS_MASTER]).unwrap();

    assert_eq!(take(&events), ["bus master on"]);
}

#[test]
fn memory_is_flushed_at_map_and_at_unmap() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Allow);
    let mut assignment = device.assign().unwrap();
    let guest = memory(1 << 20);
    guest.write_all_at(&[0xa5; 64], 0).unwrap();

    assignment.maps.map(map(&guest, 0, 1 << 20, true)).unwrap();
    assignment.maps.unmap(0, 1 << 20).unwrap();
    assignment.maps.map(map(&guest, 0, 1 << 20, true)).unwrap();
    drop(assignment);

    let found = machine.stale_lines();
    assert_eq!((found.at_map, found.at_unpin), (0, 0));
    assert_eq!(device.space().statistics().mapped, 0);
}

#[test]
fn memory_that_cannot_be_flushed_before_the_device_reaches_it_is_refused() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Allow);
    let mut assignment = device.assign().unwrap();
    machine.space_faults().unwrap().map_needs_attach.store(true, SeqCst);

    let error = assignment.maps.map(map(&memory(1 << 20), 0, 1 << 20, true)).unwrap_err();

    assert_eq!(error.errno(), libc::ENODEV, "{error}");
    assert!(error.to_string().contains("before the device can reach it"), "{error}");
    assert_eq!(machine.iommu().mapped(), []);
}

#[test]
fn an_assignment_ends_with_dma_then_interrupts_then_memory() {
    let (machine, events) = (machine(), Events::default());
    let device = recorded(&machine, Policy::Suppress, &events);
    let mut assignment = device.assign().unwrap();
    assert_eq!(take(&events), ["bus master off", "reset"], "at the assignment");
    let guest = memory(0x1000);
    assignment.maps.map(map(&guest, 0x1000, 0x1000, true)).unwrap();
    assignment.interrupts.set(&eventfds(MSIX), vec![event()]).unwrap();
    assignment.config.write(COMMAND, &mut [0b010 | BUS_MASTER]).unwrap();
    assert_eq!(take(&events), ["map", "interrupts on", "bus master on"]);

    drop(assignment);

    assert_eq!(take(&events), ["bus master off", "reset", "interrupts off", "unmap"]);
}

#[test]
fn read_only_maps_stay_read_only_and_overlaps_are_refused() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Suppress);
    let mut assignment = device.assign().unwrap();
    let guest = memory(0x4000);

    assignment.maps.map(map(&guest, 0x1000, 0x2000, false)).unwrap();

    assert!(machine.iommu().write(Iova(0x1000), &[1]).is_err(), "read-only");
    assert!(machine.iommu().read(Iova(0x1000), &mut [0]).is_ok());
    let overlaps = assignment.maps.map(map(&guest, 0x2000, 0x1000, true));
    assert!(matches!(overlaps, Err(PassthroughError::Exists { .. })));
    let cut = assignment.maps.unmap(0x1000, 0x1000);
    assert!(matches!(cut, Err(PassthroughError::Cut { .. })));
    assert!(machine.iommu().read(Iova(0x1000), &mut [0]).is_ok());
}

#[test]
fn a_range_is_unmapped_up_to_the_first_map_that_cannot_be() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Allow);
    let mut assignment = device.assign().unwrap();
    let guest = memory(0x1000);
    for address in [0x1000, 0x3000, 0x5000, 0x7000] {
        assignment.maps.map(map(&guest, address, 0x1000, true)).unwrap();
    }
    machine.space_faults().unwrap().fail_nth_copy.store(2, SeqCst);

    let error = assignment.maps.unmap(0, 0x10000).unwrap_err();

    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(error.to_string().contains("stays mapped, and so do 2"), "{error}");
    assert_eq!(
        machine.iommu().mapped().iter().map(|span| span.start().0).collect::<Vec<_>>(),
        [0x3000, 0x5000, 0x7000]
    );
    assignment.maps.unmap(0, 0x10000).unwrap();
    let found = machine.stale_lines();
    assert_eq!((device.space().statistics().mapped, found.at_map, found.at_unpin), (0, 0, 0));
}

#[test]
fn the_hosts_request_goes_to_the_guest() {
    let machine = machine();
    let device = passthrough(&machine, Policy::Suppress);
    let mut assignment = device.assign().unwrap();
    let request = event();
    assert!(!assignment.interrupts.request_unplug(), "no eventfd is set");
    assignment.interrupts.set(&eventfds(REQUEST_IRQ), vec![request.try_clone().unwrap()]).unwrap();

    machine.request_removal();

    assert!(rustix::io::read(device.request(), &mut [0; 8]).is_ok(), "this process receives it");
    assert!(assignment.interrupts.request_unplug() && signalled(&request), "and forwards it");
}
