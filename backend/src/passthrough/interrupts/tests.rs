//! Interrupts of a function whose MSI vectors behave as the kernel's do (`vfio_pci_set_msi_trigger`): they do not grow while
//! they are on, and a change that fails leaves its range without eventfds.

use std::io;
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vfio_bindings::bindings::vfio::VFIO_IRQ_INFO_EVENTFD;

use super::*;
use crate::hardware::{Function, InterruptKind, Registers};
use crate::whole_function::{RegionInfo, RegionMmap};

/// `VFIO_PCI_MSI_IRQ_INDEX`.
const MSI: u32 = 1;
const VECTORS: u32 = 8;

#[derive(Default)]
struct Msi {
    /// Which vectors have an eventfd; `None` while MSI is off.
    on: Mutex<Option<Vec<bool>>>,
    /// The errno of the next command that routes eventfds, when half of its range is done.
    failure: Mutex<Option<i32>>,
    /// The indices of all commands.
    commands: Mutex<Vec<u32>>,
}

impl Msi {
    /// `vfio_msi_set_block`.
    fn set_block(&self, vectors: &mut [bool], fds: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        if let Some(errno) = self.failure.lock().unwrap().take() {
            vectors.fill(false);
            return Err(io::Error::from_raw_os_error(errno));
        }
        vectors.iter_mut().zip(fds).for_each(|(vector, fd)| *vector = fd.is_some());
        Ok(())
    }

    fn fail_next(&self, errno: i32) {
        *self.failure.lock().unwrap() = Some(errno);
    }

    fn routed(&self) -> Option<Vec<bool>> {
        self.on.lock().unwrap().clone()
    }
}

impl Function for Msi {
    fn name(&self) -> &str {
        "msi"
    }
    fn config_read(&self, _offset: u16, _bytes: &mut [u8]) -> io::Result<()> {
        unreachable!("no configuration space")
    }
    fn config_write(&self, _offset: u16, _bytes: &[u8]) -> io::Result<()> {
        unreachable!("no configuration space")
    }
    fn registers(&self, _bar: u8) -> io::Result<Arc<dyn Registers>> {
        unreachable!("no BAR")
    }
    fn vectors(&self, _kind: InterruptKind) -> u16 {
        unreachable!("no driver in this process")
    }
    fn route_vectors(&self, _kind: InterruptKind, _events: &[BorrowedFd<'_>]) -> io::Result<()> {
        unreachable!("no driver in this process")
    }
    fn set_bus_master(&self, _on: bool) -> io::Result<()> {
        unreachable!("no DMA")
    }
    fn reset(&self) -> io::Result<()> {
        unreachable!("no reset")
    }
}

impl WholeFunction for Msi {
    fn region(&self, _index: u32) -> RegionInfo {
        RegionInfo::default()
    }
    fn region_mmap(&self, _index: u32) -> io::Result<Option<RegionMmap>> {
        Ok(None)
    }
    fn region_read(&self, _index: u32, _offset: u64, _bytes: &mut [u8]) -> io::Result<()> {
        unreachable!("no region")
    }
    fn region_write(&self, _index: u32, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        unreachable!("no region")
    }
    fn resettable(&self) -> bool {
        true
    }
    fn irq(&self, index: u32) -> IrqInfo {
        let count = if index == MSI { VECTORS } else { 1 };
        IrqInfo { flags: VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, count }
    }
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        self.commands.lock().unwrap().push(set.index);
        let mut on = self.on.lock().unwrap();
        let (start, end) = (set.start as usize, (set.start + set.count) as usize);
        match (set.data, &mut *on) {
            (IrqData::None, Some(_)) if set.count == 0 => *on = None,
            (IrqData::Eventfds(fds), Some(vectors)) if end <= vectors.len() => {
                self.set_block(&mut vectors[start..end], fds)?;
            }
            (IrqData::Eventfds(fds), None) => {
                let mut vectors = vec![false; end];
                self.set_block(&mut vectors[start..], fds)?;
                *on = Some(vectors);
            }
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
        Ok(())
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn trigger(index: u32, start: u32, count: u32, data: IrqData<'_>) -> IrqSet<'_> {
    IrqSet { index, start, count, action: IrqAction::Trigger, data }
}

/// Gives MSI vectors `start`, `start + 1`, ... an eventfd each.
fn set(interrupts: &mut Interrupts<'_>, start: u32, count: u32) -> Result<(), PassthroughError> {
    let events = (0..count).map(|_| event()).collect();
    interrupts.set(&trigger(MSI, start, count, IrqData::Eventfds(&[])), events)
}

#[test]
fn vectors_that_are_on_stay_on_when_a_change_fails() {
    for (start, count) in [(0, 1), (1, 2), (3, 2), (4, 4)] {
        let function = Msi::default();
        let mut interrupts = Interrupts::new(&function);
        set(&mut interrupts, 0, 4).unwrap();
        function.fail_next(libc::ENOMEM);

        let error = set(&mut interrupts, start, count).unwrap_err();

        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        assert_eq!(function.routed(), Some(vec![true; 4]), "{count} vectors from {start}");
    }
}

#[test]
fn an_interrupt_can_grow_after_a_change_that_failed() {
    let function = Msi::default();
    let mut interrupts = Interrupts::new(&function);
    set(&mut interrupts, 0, 4).unwrap();
    function.fail_next(libc::ENOMEM);
    set(&mut interrupts, 0, 1).unwrap_err();

    set(&mut interrupts, 4, 4).unwrap();

    assert_eq!(function.routed(), Some(vec![true; 8]));
}

#[test]
fn an_interrupt_is_turned_off_with_its_last_eventfd() {
    let function = Msi::default();
    let mut interrupts = Interrupts::new(&function);
    set(&mut interrupts, 0, 4).unwrap();

    interrupts.set(&trigger(MSI, 0, 4, IrqData::Eventfds(&[])), vec![]).unwrap();
    interrupts.set(&trigger(MSI, 0, 4, IrqData::Eventfds(&[])), vec![]).unwrap();

    assert_eq!(function.routed(), None);
}

#[test]
fn too_few_vectors_of_the_host_are_enospc_and_name_the_interrupt() {
    let function = Msi::default();
    function.fail_next(libc::ENOSPC);

    let error = set(&mut Interrupts::new(&function), 0, 8).unwrap_err();

    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(error.to_string().contains("interrupt 1: the host has too few free vectors for 8"), "{error}");
}

#[test]
fn what_is_not_an_eventfd_is_refused_for_every_interrupt_and_reaches_nobody() {
    let function = Msi::default();
    let mut interrupts = Interrupts::new(&function);
    for index in 0..IRQS {
        for action in [IrqAction::Trigger, IrqAction::Mask, IrqAction::Unmask] {
            let set = IrqSet { action, ..trigger(index, 0, 1, IrqData::Eventfds(&[])) };
            let memory = memfd_create("not an eventfd", MemfdFlags::CLOEXEC).unwrap();

            let error = interrupts.set(&set, vec![memory]).unwrap_err();

            assert_eq!(error.errno(), libc::EINVAL, "{error}");
            assert!(error.to_string().contains(&format!("interrupt {index}, vector 0: ")), "{error}");
        }
    }
    assert!(!interrupts.request_unplug());
    assert!(function.commands.lock().unwrap().is_empty());
}

#[test]
fn a_front_end_cannot_pretend_that_the_host_wants_the_function() {
    let function = Msi::default();
    let mut interrupts = Interrupts::new(&function);
    let one = [Some(event())];
    let one: Vec<_> = one.iter().map(|fd| fd.as_ref().map(AsFd::as_fd)).collect();
    for action in [IrqAction::Trigger, IrqAction::Mask, IrqAction::Unmask] {
        for (count, data) in
            [(1, IrqData::None), (1, IrqData::Bools(&[1])), (0, IrqData::Eventfds(&[])), (1, IrqData::Eventfds(&one))]
        {
            let set = IrqSet { action, ..trigger(REQUEST_IRQ, 0, count, data) };
            let sets = action == IrqAction::Trigger && count == 1 && matches!(data, IrqData::Eventfds(_));

            assert_eq!(interrupts.set(&set, vec![]).is_ok(), sets, "{set:?}");
        }
    }
    interrupts.set(&trigger(REQUEST_IRQ, 0, 0, IrqData::None), vec![]).unwrap();

    assert!(function.commands.lock().unwrap().is_empty(), "the eventfd there is this process's own");
}
