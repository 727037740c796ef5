//! The function of a [`Passthrough`](super::Passthrough), which can be closed and replaced by the same function, acquired anew.
//!
//! VFIO binds a device file only once at a time. While any duplicate of the bound file lives, in whatever process, nobody can
//! bind another one. When the last duplicate is closed, VFIO detaches the device from its page table, turns its interrupts off
//! and resets it. So after a close and a successful bind, nothing is left of what others did with the former file.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::io::Errno;

use crate::coherency::Facts;
use crate::hardware::{Function, InterruptKind, Registers};
use crate::whole_function::{IrqInfo, IrqSet, RegionInfo, RegionMmap, WholeFunction};

/// Acquires a function that has been closed, attached to its former address space. Tries once and does not wait.
pub type ReacquireFn = Box<dyn Fn() -> Result<Reacquired, ReacquireError> + Send + Sync>;

/// A function that has been acquired anew.
pub struct Reacquired {
    /// The function, with bus master off.
    pub function: Arc<dyn WholeFunction>,
    /// The facts about its DMA, gathered anew.
    pub facts: Facts,
}

/// Why a function cannot be acquired anew.
#[derive(Debug)]
pub enum ReacquireError {
    /// A duplicate of its former file is still open or mapped. A later attempt may succeed.
    Held(anyhow::Error),
    /// It is no longer bound to vfio-pci: the host has taken it.
    Taken(anyhow::Error),
    /// Another reason.
    Failed(anyhow::Error),
}

/// See the top of this file. While it is closed, every access fails with ENODEV.
pub(super) struct ReplaceableFunction {
    name: String,
    /// The only handle in this process, so the device file is closed when it is dropped.
    open: RwLock<Option<Arc<dyn WholeFunction>>>,
    /// The device's own file has been handed out since the function was opened.
    handed_out: AtomicBool,
}

impl ReplaceableFunction {
    pub(super) fn new(function: Arc<dyn WholeFunction>) -> Self {
        let name = function.name().to_owned();
        Self { name, open: RwLock::new(Some(function)), handed_out: AtomicBool::new(false) }
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// True if somebody else may have the device's own file.
    pub(super) fn is_handed_out(&self) -> bool {
        self.handed_out.load(SeqCst)
    }

    /// Closes the function.
    pub(super) fn close(&self) {
        drop(self.open.write().unwrap_or_else(PoisonError::into_inner).take());
        self.handed_out.store(false, SeqCst);
    }

    /// Opens it again: `function` has been acquired anew, so nobody else has its file.
    pub(super) fn reopen(&self, function: Arc<dyn WholeFunction>) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = Some(function);
    }

    /// The result of `call`; `None` while the function is closed.
    fn get<T>(&self, call: impl FnOnce(&dyn WholeFunction) -> T) -> Option<T> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).as_deref().map(call)
    }

    fn call<T>(&self, call: impl FnOnce(&dyn WholeFunction) -> io::Result<T>) -> io::Result<T> {
        self.get(call).unwrap_or(Err(Errno::NODEV.into()))
    }
}

impl Function for ReplaceableFunction {
    fn name(&self) -> &str {
        &self.name
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.call(|function| function.config_read(offset, bytes))
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.call(|function| function.config_write(offset, bytes))
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.call(|function| function.registers(bar))
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.get(|function| function.vectors(kind)).unwrap_or_default()
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.call(|function| function.route_vectors(kind, events))
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.call(|function| function.unmask_intx())
    }
    fn interrupt_wanted(&self, vector: u16) -> Option<Arc<AtomicBool>> {
        self.get(|function| function.interrupt_wanted(vector)).flatten()
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.call(|function| function.set_bus_master(on))
    }
    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.call(|function| function.route_removal(event))
    }
    fn reset(&self) -> io::Result<()> {
        self.call(|function| function.reset())
    }
}

impl WholeFunction for ReplaceableFunction {
    fn region(&self, index: u32) -> RegionInfo {
        self.get(|function| function.region(index)).unwrap_or_default()
    }
    fn region_mmap(&self, index: u32) -> io::Result<Option<RegionMmap>> {
        let mmap = self.call(|function| function.region_mmap(index))?;
        if mmap.as_ref().is_some_and(|mmap| mmap.own_file) {
            self.handed_out.store(true, SeqCst);
        }
        Ok(mmap)
    }
    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.call(|function| function.region_read(index, offset, bytes))
    }
    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.call(|function| function.region_write(index, offset, bytes))
    }
    fn resettable(&self) -> bool {
        self.get(|function| function.resettable()).unwrap_or_default()
    }
    fn irq(&self, index: u32) -> IrqInfo {
        self.get(|function| function.irq(index)).unwrap_or_default()
    }
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        self.call(|function| function.set_irqs(set))
    }
}
