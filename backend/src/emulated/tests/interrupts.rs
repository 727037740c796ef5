//! Messages and the line of the emulated function, as a driver and as a virtual machine monitor use them.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::host::{Host, Pair, Sqe, small};
use crate::addr::Iova;
use crate::emulated::Options;
use crate::hardware::InterruptKind;
use crate::whole_function::{IrqAction, IrqData, IrqInfo, IrqSet};

/// `VFIO_PCI_INTX_IRQ_INDEX` and `VFIO_PCI_MSI_IRQ_INDEX`.
const INTX: u32 = 0;
const MSI: u32 = 1;
/// INTMS and INTMC.
const INTMS: usize = 0x0c;
const INTMC: usize = 0x10;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

/// The signals since the last call.
fn signals(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

fn set(index: u32, count: u32, action: IrqAction, data: IrqData<'_>) -> IrqSet<'_> {
    IrqSet { index, start: 0, count, action, data }
}

/// Bit 3 of Status: Interrupt Status.
fn status_is_set(host: &Host) -> bool {
    let mut status = [0];
    host.function.config_read(6, &mut status).unwrap();
    status[0] & 1 << 3 != 0
}

#[test]
fn a_line_is_masked_at_each_interrupt_and_signals_again_only_if_it_is_still_asserted() {
    let mut host = Host::enabled(Options { vectors: Some(0), intx: true, ..small() });
    let line = event();
    host.function.route_vectors(InterruptKind::Intx, &[line.as_fd()]).unwrap();
    let page = host.buffer(4096);

    host.admin(Sqe::new(6).dword(10, 1).prps(page.span().start(), Iova(0)));
    assert_eq!(signals(&line), 1);
    assert!(!status_is_set(&host), "the host has acknowledged the completion");
    host.function.unmask_intx().unwrap();

    assert_eq!(signals(&line), 0);
    host.admin(Sqe::new(6).dword(10, 1).prps(page.span().start(), Iova(0)));
    host.admin(Sqe::new(6).dword(10, 1).prps(page.span().start(), Iova(0)));
    assert_eq!(signals(&line), 1, "masked since the first");
}

#[test]
fn the_mask_of_the_controller_hides_what_asserts_the_line() {
    let mut host = Host::enabled(Options { vectors: Some(0), intx: true, ..small() });
    let line = event();
    host.function.route_vectors(InterruptKind::Intx, &[line.as_fd()]).unwrap();
    host.bar.write32(INTMS, 1);
    let mut admin = std::mem::replace(&mut host.admin, Pair::new(&*host.space, 0, [2; 2]));
    host.push(&mut admin, Sqe::new(0x0a).dword(10, 7));
    host.ring(&admin);
    assert_eq!((signals(&line), status_is_set(&host)), (0, false));

    host.bar.write32(INTMC, 1);

    assert_eq!((signals(&line), status_is_set(&host)), (1, true));
}

#[test]
fn a_monitor_sees_line_and_messages_and_uses_one_of_them() {
    let host = Host::enabled(Options { vectors: Some(0), msi: 4, intx: true, ..small() });
    let function = host.machine.whole_function();
    assert_eq!(function.irq(INTX), IrqInfo { flags: 0b111, count: 1 }, "eventfd, maskable, masked automatically");
    assert_eq!(function.irq(MSI), IrqInfo { flags: 0b1001, count: 4 }, "eventfd, of fixed size");
    let event = event();
    let eventfds = [Some(event.as_fd())];
    function.set_irqs(&set(INTX, 1, IrqAction::Trigger, IrqData::Eventfds(&eventfds))).unwrap();

    for action in [IrqAction::Mask, IrqAction::Unmask] {
        function.set_irqs(&set(INTX, 1, action, IrqData::None)).unwrap();
        assert!(function.set_irqs(&set(MSI, 1, action, IrqData::None)).is_err(), "messages cannot be masked");
    }
    let both = function.set_irqs(&set(MSI, 1, IrqAction::Trigger, IrqData::Eventfds(&eventfds)));
    assert!(both.is_err(), "one kind at a time");
    function.set_irqs(&set(INTX, 0, IrqAction::Trigger, IrqData::None)).unwrap();
    function.set_irqs(&set(MSI, 1, IrqAction::Trigger, IrqData::Eventfds(&eventfds))).unwrap();
}

#[test]
fn capabilities_are_those_of_the_supply() {
    for (vectors, msi, intx, ids) in [
        (None, 0, false, vec![1, 0x10, 0x11]),
        (Some(0), 4, true, vec![1, 0x10, 5]),
        (Some(3), 1, false, vec![1, 0x10, 5, 0x11]),
        (Some(0), 0, false, vec![1, 0x10]),
    ] {
        let host = Host::disabled(Options { vectors, msi, intx, ..small() });
        let byte = |at: u8| {
            let mut byte = [0];
            host.function.config_read(at.into(), &mut byte).unwrap();
            byte[0]
        };
        let mut found = Vec::new();
        let mut at = byte(0x34);
        while at != 0 {
            found.push(byte(at));
            at = byte(at + 1);
        }
        assert_eq!(found, ids);
        assert_eq!(byte(0x3d), u8::from(intx), "Interrupt Pin");
    }
}
