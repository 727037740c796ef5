//! The host requests a function without MSI-X while a front-end uses it, and QEMU's monitor is asked to unplug it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use testbed::monitor::{FakeMonitor, Objects};
use vhost_device_vfio::hardware::{Function, InterruptKind, Registers};
use vhost_device_vfio::qmp::Monitor;
use vhost_device_vfio::vfio_user::EndReason;
use vhost_device_vfio::whole_function::{IrqInfo, IrqSet, MSIX_IRQ, RegionInfo, RegionMmap, WholeFunction};

use crate::client::{CONFIG, SET_IRQS, words};
use crate::rig::{Rig, event, wait_for};

/// Longer than the 10 s for which a front-end keeps a function that the host wants.
const LIMIT: Duration = Duration::from_secs(20);
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
const REQ: u32 = 4;

fn machine() -> Objects {
    vec![
        ("/machine/peripheral", vec![("ours", "child<vfio-user-pci>")]),
        ("/machine/peripheral-anon", vec![]),
        ("/machine/peripheral/ours", vec![]),
    ]
}

fn rig(monitor: &FakeMonitor) -> Rig {
    Rig::with_monitor(Monitor::new(monitor.path().into(), None))
}

#[test]
fn a_front_end_without_a_request_eventfd_is_unplugged_by_its_monitor() {
    let monitor = FakeMonitor::of(machine());
    let rig = rig(&monitor);
    let mut client = rig.client();

    rig.machine.request_removal();
    let commands: Vec<_> = (0..5).map(|_| monitor.next_command(LIMIT)).collect();
    assert_eq!(commands[4], r#"device_del {"id":"/machine/peripheral/ours"}"#, "{commands:?}");
    assert!(client.read(CONFIG, 0, 4).is_ok(), "the front-end is served until it has unplugged");
    drop(client);

    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

#[test]
fn a_front_end_that_has_set_a_request_eventfd_is_asked_by_that_alone() {
    let monitor = FakeMonitor::of(machine());
    let rig = rig(&monitor);
    let mut client = rig.client();
    let request = event();
    client.call(SET_IRQS, &words(&[20, EVENTFD_TRIGGER, REQ, 0, 1]), &[request.as_fd()]).unwrap();

    rig.machine.request_removal();
    assert!(wait_for(&request, 10_000));
    drop(client);

    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
    assert_eq!(monitor.commands(), [""; 0]);
}

#[test]
fn a_monitor_that_is_silent_delays_neither_the_front_end_nor_the_host() {
    let monitor = FakeMonitor::serving(|mut stream, _| io::copy(&mut stream, &mut io::sink()).map(drop));
    let rig = rig(&monitor);
    let mut client = rig.client();

    rig.machine.request_removal();
    let served = (0..100).filter(|_| client.read(CONFIG, 0, 4).is_ok()).count();

    assert_eq!(served, 100, "while the monitor is asked");
    assert!(client.receive().is_none(), "then the function is taken away");
    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

/// A function whose MSI-X is hidden.
pub(crate) struct WithoutMsix(pub(crate) Arc<dyn WholeFunction>);

impl Function for WithoutMsix {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.0.config_read(offset, bytes)
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.0.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.0.registers(bar)
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.0.vectors(kind)
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.route_vectors(kind, events)
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.0.unmask_intx()
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.0.set_bus_master(on)
    }
    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.0.route_removal(event)
    }
    fn reset(&self) -> io::Result<()> {
        self.0.reset()
    }
}

impl WholeFunction for WithoutMsix {
    fn region(&self, index: u32) -> RegionInfo {
        self.0.region(index)
    }
    fn region_mmap(&self, index: u32) -> io::Result<Option<RegionMmap>> {
        self.0.region_mmap(index)
    }
    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.region_read(index, offset, bytes)
    }
    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.region_write(index, offset, bytes)
    }
    fn resettable(&self) -> bool {
        self.0.resettable()
    }
    fn irq(&self, index: u32) -> IrqInfo {
        if index == MSIX_IRQ { IrqInfo::default() } else { self.0.irq(index) }
    }
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        self.0.set_irqs(set)
    }
}
