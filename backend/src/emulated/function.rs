//! The PCI side: configuration space, BAR 0, vectors, bus master and reset, as `vfio-pci` presents them.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::hardware::{Function, InterruptKind, Registers};

use super::config::{BUS_MASTER, Config, MEMORY_SPACE};
use super::controller::Controller;
use super::fault::Fault;
use super::iommu::SoftIommu;
use super::medium::Store;
use super::register_file::Layout;
use super::registers::Bar;
use super::traffic::Traffic;
use super::worker::Worker;
use super::{EmulatedError, Mode, Options, lock};

/// An emulated NVMe function in this process.
pub struct EmulatedFunction {
    pub(super) controller: Arc<Controller>,
    layout: Layout,
    config: Mutex<Config>,
    worker: Option<Arc<Worker>>,
    /// Signalled to request that the user release the function.
    removal: Mutex<Option<OwnedFd>>,
}

impl EmulatedFunction {
    pub(super) fn new(options: Options, iommu: SoftIommu) -> Result<Self, EmulatedError> {
        let layout = Layout::new(options.queues, options.vectors(), options.doorbell_stride);
        let mode = options.mode;
        let controller = Arc::new(Controller::new(options, iommu)?);
        let worker = match mode {
            Mode::Inline => None,
            Mode::Threaded => Some(Arc::new(Worker::start(&controller)?)),
        };
        let config = Config::new(layout, &controller.options);
        controller.iommu.set_no_snoop(config.no_snoop());
        Ok(Self { controller, layout, config: Mutex::new(config), worker, removal: Mutex::default() })
    }

    pub(super) fn medium_file(&self) -> Option<Arc<File>> {
        self.controller.store.file()
    }

    pub(super) fn stores_data(&self) -> bool {
        !matches!(self.controller.store, Store::Null)
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.controller.traffic()
    }

    /// Applies the Command and Device Control registers.
    fn apply_command(&self, config: &Config) {
        self.controller.iommu.set_no_snoop(config.no_snoop());
        let command = config.command();
        self.controller.decoding.store(command & MEMORY_SPACE != 0, SeqCst);
        let on = command & BUS_MASTER != 0;
        let was = self.controller.bus_master.swap(on, SeqCst);
        if on && !was {
            self.controller.wake(|controller| {
                controller.run_all();
            });
        }
        if was && !on {
            self.controller.wait_for_running_commands();
        }
    }
}

impl Function for EmulatedFunction {
    fn name(&self) -> &str {
        "emulated"
    }

    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        if self.removed() {
            bytes.fill(0xff);
            return Ok(());
        }
        let asserted = self.controller.line_is_asserted();
        let done = lock(&self.config).read(offset.into(), bytes, asserted);
        done.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        if self.removed() {
            return Ok(());
        }
        let mut config = lock(&self.config);
        let reset = config.write(offset.into(), bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.apply_command(&config);
        drop(config);
        if reset { self.reset() } else { Ok(()) }
    }

    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        if bar != 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::new(self.bar()))
    }

    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.controller.options.vectors_of(kind)
    }

    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.controller.route(kind, events)
    }

    fn unmask_intx(&self) -> io::Result<()> {
        self.controller.unmask_line();
        Ok(())
    }

    fn interrupt_wanted(&self, vector: u16) -> Option<Arc<AtomicBool>> {
        self.controller.interrupts.wanted(vector)
    }

    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        *lock(&self.removal) = Some(event.try_clone_to_owned()?);
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        if self.removed() {
            return Ok(());
        }
        let mut config = lock(&self.config);
        config.set_bus_master(on);
        self.apply_command(&config);
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        if self.removed() {
            return Err(rustix::io::Errno::NODEV.into());
        }
        if self.controller.faults.reset_refused.load(SeqCst) {
            return Err(rustix::io::Errno::IO.into());
        }
        self.power_on();
        Ok(())
    }
}

impl EmulatedFunction {
    /// BAR 0.
    pub(super) fn bar(&self) -> Bar {
        let size = usize::try_from(self.layout.size).expect("a BAR fits the address space");
        Bar { controller: Arc::clone(&self.controller), size, _worker: self.worker.clone() }
    }

    /// Signals the event of [`Function::route_removal`].
    pub(super) fn request_removal(&self) {
        if let Some(event) = &*lock(&self.removal)
            && let Err(errno) = rustix::io::write(event, &1_u64.to_ne_bytes())
        {
            log::warn!("emulated function: signal the removal request: {errno}");
        }
    }

    fn removed(&self) -> bool {
        self.controller.faults.removed.load(SeqCst)
    }

    pub(super) fn resize(&self, namespace: u32, bytes: u64) -> io::Result<()> {
        self.controller.resize(namespace, bytes)?;
        self.controller.report_events();
        Ok(())
    }

    pub(super) fn advance(&self, time: Duration) {
        self.controller.advance(time);
    }

    pub(super) fn inject(&self, fault: Fault) {
        let removed = fault == Fault::Removed;
        self.controller.faults.inject(fault);
        if removed {
            self.controller.remove();
            self.controller.wait_for_running_commands();
        }
    }

    pub(super) fn clear_faults(&self) {
        let removed = self.removed();
        self.controller.faults.clear();
        if removed {
            self.power_on();
            return;
        }
        // CC writes that were ignored while the controller was stuck take effect now.
        self.controller.wake(|controller| {
            controller.run_all();
        });
    }

    /// Returns to the power-on state, after a reset or when a removed function comes back.
    fn power_on(&self) {
        let mut config = lock(&self.config);
        self.controller.bus_master.store(false, SeqCst);
        self.controller.reset_registers();
        self.controller.unroute();
        *config = Config::new(self.layout, &self.controller.options);
        self.apply_command(&config);
    }
}
