//! The device file of an emulated function, with VFIO's rule: while any duplicate of the bound file lives, in whatever process,
//! the function cannot be bound again. The file is the write end of a pipe, whose read end reports when the last duplicate has
//! been closed.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::hardware::{Function, InterruptKind, Registers};
use crate::whole_function::{IrqInfo, IrqSet, RegionInfo, RegionMmap, WholeFunction};

use super::lock;

/// See the top of this file.
pub struct EmulatedCdev {
    function: Arc<dyn WholeFunction>,
    /// BAR 0 can be mapped with the device's own file; else with a file of this BAR, as a dma-buf is.
    own_file: bool,
    /// The read end, while the function is bound or its file lives.
    bound: Mutex<Option<OwnedFd>>,
}

/// A bound function, which hands its file out for BAR 0.
struct BoundFunction {
    function: Arc<dyn WholeFunction>,
    own_file: bool,
    file: OwnedFd,
}

impl EmulatedCdev {
    /// The file of `function`. `own_file`: this file itself is handed out, for BAR 0.
    #[must_use]
    pub fn new(function: Arc<dyn WholeFunction>, own_file: bool) -> Self {
        Self { function, own_file, bound: Mutex::default() }
    }

    /// Binds the function, which is reset.
    ///
    /// # Errors
    /// EINVAL while a duplicate of the former file lives.
    pub fn bind(&self) -> io::Result<Arc<dyn WholeFunction>> {
        let mut bound = lock(&self.bound);
        if bound.as_ref().is_some_and(|read| !is_hung_up(read)) {
            return Err(Errno::INVAL.into());
        }
        self.function.reset()?;
        let (read, file) = pipe_with(PipeFlags::CLOEXEC)?;
        *bound = Some(read);
        Ok(Arc::new(BoundFunction { function: Arc::clone(&self.function), own_file: self.own_file, file }))
    }
}

fn is_hung_up(read: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(read, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

impl Function for BoundFunction {
    fn name(&self) -> &str {
        self.function.name()
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.function.config_read(offset, bytes)
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.function.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.function.registers(bar)
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.function.vectors(kind)
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.function.route_vectors(kind, events)
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.function.unmask_intx()
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.function.set_bus_master(on)
    }
    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.function.route_removal(event)
    }
    fn reset(&self) -> io::Result<()> {
        self.function.reset()
    }
}

impl WholeFunction for BoundFunction {
    fn region(&self, index: u32) -> RegionInfo {
        self.function.region(index)
    }
    fn region_mmap(&self, index: u32) -> io::Result<Option<RegionMmap>> {
        if index != 0 {
            return Ok(None);
        }
        let file = if self.own_file { self.file.try_clone()? } else { pipe_with(PipeFlags::CLOEXEC)?.0 };
        let (areas, own_file) = (Vec::new(), self.own_file);
        Ok(Some(RegionMmap { file, offset: 0, areas, own_file, rights: "an emulated file" }))
    }
    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.function.region_read(index, offset, bytes)
    }
    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.function.region_write(index, offset, bytes)
    }
    fn resettable(&self) -> bool {
        self.function.resettable()
    }
    fn irq(&self, index: u32) -> IrqInfo {
        self.function.irq(index)
    }
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        self.function.set_irqs(set)
    }
}
