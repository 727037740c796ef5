//! The controller: its registers, its state, and all queue memory it may access.
//!
//! ```text
//!              enable()                       disable()
//!  Stopped ----------------> Running  ----------------------------> Stopped
//!  bus master off            DMA into          CC.EN = 0 and RDY = 0, else reset;
//!  no memory                 `memory`          then bus master off, then memory freed
//! ```
//!
//! [`Controller`] owns the queue memory and frees it in one place, `stop`, which `drop` calls as well. So on every path,
//! including each early return during initialization, the controller is stopped before its memory is freed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::NvmeErrorKind;
use super::logs::RESETS;
use super::queue::Doorbells;
use super::regs::{
    ACQ, AQA, ASQ, CAP, CC, CC_CSS_ALL, CC_EN, CC_SETTINGS, CC_SHN_MASK, CC_SHN_NORMAL, CMBMSC, CRTO, CSTS,
    Capabilities, ControllerStatus, DOORBELLS, INTMS, PAGE, VS, Version, registers_needed,
};
use super::rings::QueueMemory;
use crate::addr::{Address, Iova};
use crate::hardware::{AddressSpace, DmaBuffer, Function, InterruptKind, Registers};

/// Poll interval of the first few milliseconds, in which a healthy controller completes, and of the time after.
const STEP: Duration = Duration::from_micros(50);
const LONG_STEP: Duration = Duration::from_millis(1);

/// How long all registers may read as ones after CC has changed, before the controller counts as gone. Drives are known that
/// take more than 2 s.
const LONGEST_SILENCE: Duration = Duration::from_secs(3);

/// Calls `look` until it returns a value or `limit` has passed.
pub(super) fn poll<T>(
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, NvmeErrorKind>,
) -> Result<Option<T>, NvmeErrorKind> {
    let start = Instant::now();
    loop {
        // Read the time before the call, so that the last call comes after the limit. Otherwise a process that was not
        // scheduled for a while would report a time-out that the controller did not cause.
        let waited = start.elapsed();
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if waited >= limit {
            return Ok(None);
        }
        std::thread::sleep(if waited < LONG_STEP * 5 { STEP } else { LONG_STEP });
    }
}

/// Addresses and size of the admin rings.
pub(super) struct AdminRings {
    pub(super) submissions: Iova,
    pub(super) completions: Iova,
    /// Entries of each.
    pub(super) size: u16,
}

/// A controller and the memory it may access.
pub(super) struct Controller {
    function: Arc<dyn Function>,
    space: Arc<dyn AddressSpace>,
    registers: Arc<dyn Registers>,
    capabilities: Capabilities,
    memory: Vec<DmaBuffer>,
    /// True while the controller may do DMA.
    running: bool,
    /// The kind of interrupt that is on.
    interrupt: Option<InterruptKind>,
}

impl Controller {
    /// Maps the registers of `function` and checks its capabilities. Bus mastering is off afterwards.
    pub(super) fn open(function: Arc<dyn Function>, space: Arc<dyn AddressSpace>) -> Result<Self, NvmeErrorKind> {
        check_class(&*function)?;
        function.set_bus_master(false).map_err(NvmeErrorKind::function("turn bus mastering off"))?;
        let registers = function.registers(0).map_err(NvmeErrorKind::function("map the registers (BAR 0)"))?;
        // The least that any controller has: the admin queue's doorbells with a stride of 4.
        if registers.size() < DOORBELLS + 8 {
            return Err(NvmeErrorKind::Unsuitable {
                property: "size of the registers (BAR 0)",
                found: format!("{} bytes", registers.size()),
                wanted: "4104 bytes or more",
            });
        }
        let capabilities = Capabilities(registers.read64(CAP));
        let controller =
            Self { function, space, registers, capabilities, memory: Vec::new(), running: false, interrupt: None };
        controller.check_capabilities()?;
        Ok(controller)
    }

    fn check_capabilities(&self) -> Result<(), NvmeErrorKind> {
        let cap = self.capabilities;
        let unsuitable = |property, found, wanted| Err(NvmeErrorKind::Unsuitable { property, found, wanted });
        if cap.is_gone() {
            return Err(NvmeErrorKind::Gone);
        }
        if cap.administrative() {
            let found = "an administrative one, without I/O command set (CAP.CSS = 80h)".to_owned();
            return unsuitable("this controller", found, "an I/O controller");
        }
        if !cap.nvm_command_set() && !cap.several_command_sets() {
            return unsuitable("CAP", format!("{:#018x} (no NVM command set)", cap.0), "CSS bit 0");
        }
        if cap.min_page() > PAGE {
            return unsuitable("smallest memory page (CAP.MPSMIN)", format!("{} bytes", cap.min_page()), "4096");
        }
        if cap.max_queue_entries() < 2 {
            return unsuitable("largest queue (CAP.MQES)", format!("{} entries", cap.max_queue_entries()), "2 or more");
        }
        if self.registers.size() < registers_needed(0, cap.doorbell_stride()) {
            let found = format!("{} bytes apart", cap.doorbell_stride());
            return unsuitable("doorbell stride (CAP.DSTRD)", found, "a stride that fits the size of BAR 0");
        }
        Ok(())
    }

    /// The PCI function.
    pub(super) fn function(&self) -> &dyn Function {
        &*self.function
    }

    /// The same, to be kept by a queue. Queues are dropped before the function is released.
    pub(super) fn shared_function(&self) -> Arc<dyn Function> {
        Arc::clone(&self.function)
    }

    /// Records that this kind of interrupt is on, until the controller has stopped.
    pub(super) fn set_interrupt(&mut self, kind: InterruptKind) {
        self.interrupt = Some(kind);
    }

    /// Keeps a controller without any interrupt on from asserting INTx, which would be spurious on the host and could make it
    /// turn a shared line off. The registers are undefined while MSI-X is on. NVMe 2.0 §3.1.3.3
    pub(super) fn mask_interrupts(&self) {
        self.registers.write32(INTMS, u32::MAX);
    }

    /// CAP.
    pub(super) fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// VS.
    pub(super) fn version(&self) -> Version {
        Version(self.registers.read32(VS))
    }

    /// CSTS; an error if the controller is gone.
    pub(super) fn status(&self) -> Result<ControllerStatus, NvmeErrorKind> {
        let status = ControllerStatus(self.registers.read32(CSTS));
        if status.is_gone() { Err(NvmeErrorKind::Gone) } else { Ok(status) }
    }

    /// The doorbells of all queues.
    pub(super) fn doorbells(&self) -> Doorbells {
        Doorbells { registers: Arc::clone(&self.registers), stride: self.capabilities.doorbell_stride() }
    }

    /// The highest queue identifier whose doorbells lie inside BAR 0.
    pub(super) fn last_queue(&self) -> u16 {
        let stride = self.capabilities.doorbell_stride();
        let fits = (self.registers.size() - DOORBELLS) / (2 * stride);
        u16::try_from(fits.saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// Allocates zeroed memory for `what`, which is freed when the controller has stopped.
    pub(super) fn memory(&mut self, what: &'static str, bytes: usize) -> Result<QueueMemory, NvmeErrorKind> {
        let buffer = self.space.buffer(bytes).map_err(|source| NvmeErrorKind::Memory { what, source })?;
        assert!(buffer.span().start().is_aligned(PAGE), "queue memory at {}", buffer.span());
        let memory = QueueMemory::new(&buffer, self.space.caches());
        self.memory.push(buffer);
        Ok(memory)
    }

    fn ready_timeout(&self) -> Duration {
        self.capabilities.ready_timeout(|| self.registers.read32(CRTO))
    }

    /// Waits until `reached` accepts CSTS. Some controllers answer nothing for a while after CC has changed.
    fn wait(
        &self,
        condition: &'static str,
        limit: Duration,
        reached: impl Fn(ControllerStatus) -> bool,
    ) -> Result<(), NvmeErrorKind> {
        let answers = || Ok((!ControllerStatus(self.registers.read32(CSTS)).is_gone()).then_some(()));
        for _ in 0..2 {
            let found = poll(limit, || match self.status() {
                Err(NvmeErrorKind::Gone) => Ok(Some(None)),
                status => Ok(Some(status?).filter(|status| reached(*status)).map(Some)),
            })?;
            match found {
                Some(Some(_)) => return Ok(()),
                Some(None) => poll(LONGEST_SILENCE, answers)?.ok_or(NvmeErrorKind::Gone)?,
                None => break,
            }
        }
        Err(NvmeErrorKind::StatusTimeout { condition, limit, status: format!("{:?}", self.status()?) })
    }

    /// Clears CC.EN and waits for CSTS.RDY = 0. NVMe 2.0 §3.7.2
    pub(super) fn disable(&self) -> Result<(), NvmeErrorKind> {
        let limit = self.ready_timeout();
        let configuration = self.registers.read32(CC);
        if configuration == u32::MAX {
            return Err(NvmeErrorKind::Gone);
        }
        if configuration & CC_EN != 0 {
            // Clearing EN before RDY has followed it to 1 is undefined. NVMe 2.0 §3.1.3.5
            let ready =
                self.wait("CSTS.RDY = 1", limit, |status| status.ready() || status.fatal() || status.shutting_down());
            if let Err(error @ NvmeErrorKind::StatusTimeout { .. }) = &ready {
                RESETS.warn(|| format!("{}: {error}; disabling it anyway", self.function.name()));
            } else {
                ready?;
            }
            self.registers.write32(CC, configuration & !(CC_EN | CC_SHN_MASK));
        }
        self.wait("CSTS.RDY = 0", limit, |status| !status.ready())
    }

    /// Enables the disabled controller with its admin queues. NVMe 2.0 §3.5.1
    pub(super) fn enable(&mut self, admin: &AdminRings) -> Result<(), NvmeErrorKind> {
        let last = u32::from(admin.size - 1);
        self.registers.write32(AQA, last << 16 | last);
        self.registers.write64(ASQ, admin.submissions.raw());
        self.registers.write64(ACQ, admin.completions.raw());
        if self.capabilities.memory_buffer() {
            // Addresses of the buffer, if its former user has chosen some, would not reach memory.
            self.registers.write64(CMBMSC, 0);
        }
        let all_sets = if self.capabilities.several_command_sets() { CC_CSS_ALL } else { 0 };
        let settings = CC_SETTINGS | all_sets;
        self.registers.write32(CC, settings);
        self.running = true;
        self.function.set_bus_master(true).map_err(NvmeErrorKind::function("turn bus mastering on"))?;
        self.registers.write32(CC, settings | CC_EN);
        self.wait("CSTS.RDY = 1", self.ready_timeout(), |status| status.ready() || status.fatal())?;
        let status = self.status()?;
        if status.fatal() { Err(NvmeErrorKind::fatal(status)) } else { Ok(()) }
    }

    /// Requests a normal shutdown, in which the controller makes its data durable. NVMe 2.0 §3.6.1
    pub(super) fn notify_shutdown(&self, limit: Duration) -> Result<(), NvmeErrorKind> {
        let configuration = self.registers.read32(CC);
        self.registers.write32(CC, configuration & !CC_SHN_MASK | CC_SHN_NORMAL);
        self.wait("CSTS.SHST = 10b (shutdown complete)", limit, ControllerStatus::shutdown_complete)
    }

    /// Another process has driven the controller since it was stopped: whatever it does now, [`Self::stop`] must end it.
    pub(super) fn assume_running(&mut self) {
        self.running = true;
    }

    /// Another process may have turned on any kind, and no other can be turned on before.
    pub(super) fn turn_every_interrupt_off(&self) {
        for kind in [InterruptKind::MsiX, InterruptKind::Msi, InterruptKind::Intx] {
            // The kinds that are off already refuse this.
            if let Err(error) = self.function.route_vectors(kind, &[]) {
                log::debug!("{}: turn {kind} off: {error}", self.function.name());
            }
        }
    }

    /// Another process drives the controller: from now on this one does not access it.
    pub(super) fn leave(mut self) {
        self.running = false;
        // A buffer of a stopped controller has been freed already.
        debug_assert!(self.memory.is_empty());
    }

    /// Ends all DMA and frees the memory. On error DMA cannot be ruled out, and the memory stays mapped.
    pub(super) fn stop(&mut self) -> Result<(), NvmeErrorKind> {
        if !self.running {
            self.memory.clear();
            return Ok(());
        }
        let disabled = self.disable();
        let bus_master_off =
            self.function.set_bus_master(false).map_err(NvmeErrorKind::function("turn bus mastering off"));
        let reset = match &disabled {
            Ok(()) => Ok(()),
            Err(error) => {
                RESETS.warn(|| format!("{}: {error}; resetting the function", self.function.name()));
                self.function.reset().map_err(NvmeErrorKind::function("reset the function"))
            }
        };
        if let Err(error) = &reset {
            RESETS.error(|| format!("{}: {error}", self.function.name()));
        }
        if let Some(kind) = self.interrupt.take()
            && let Err(error) = self.function.route_vectors(kind, &[])
        {
            log::debug!("{}: turn {kind} off: {error}", self.function.name());
        }
        // Any one of these ends all DMA: the controller is disabled, the function is reset (which also turns bus mastering
        // off), or bus mastering is off.
        if let Err(error) = bus_master_off {
            if reset.is_err() {
                let kept = self.memory.drain(..).map(std::mem::forget).count();
                RESETS.error(|| format!("{}: may still do DMA; {kept} buffers stay mapped", self.function.name()));
                return Err(error);
            }
            RESETS.warn(|| format!("{}: {error}", self.function.name()));
        }
        self.running = false;
        self.memory.clear();
        Ok(())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            RESETS.error(|| format!("{}: {error}", self.function.name()));
        }
    }
}

/// Opens `function` and routes the host's removal request to `removal`.
pub(super) fn open(
    function: Arc<dyn Function>,
    space: &Arc<dyn AddressSpace>,
    removal: &OwnedFd,
) -> Result<Controller, NvmeErrorKind> {
    route_removal(&*function, removal);
    Controller::open(function, Arc::clone(space))
}

pub(super) fn route_removal(function: &dyn Function, removal: &OwnedFd) {
    if let Err(error) = function.route_removal(removal.as_fd()) {
        RESETS.warn(|| format!("{}: removal requests of the host will not be seen: {error}", function.name()));
    }
}

/// Refuses a function that is not an NVMe I/O controller, class code 010802h. NVMe over PCIe Transport 1.0, PCI header
/// register "Class Code"
fn check_class(function: &dyn Function) -> Result<(), NvmeErrorKind> {
    let mut bytes = [0; 3];
    function.config_read(0x09, &mut bytes).map_err(NvmeErrorKind::function("read the class code"))?;
    let what = match bytes {
        [0x02, 0x08, 0x01] => return Ok(()),
        [0xff, 0xff, 0xff] => return Err(NvmeErrorKind::Gone),
        [0x03, 0x08, 0x01] => "an NVMe administrative controller, which has no I/O queues",
        [_, 0x08, 0x01] => "an NVMe function but no I/O controller",
        [_, _, 0x01] => "another kind of storage controller",
        [_, _, 0x02] => "a network controller",
        [_, _, 0x03] => "a display controller",
        [_, _, 0x04] => "a multimedia device",
        [_, _, 0x06] => "a bridge",
        [_, 0x03, 0x0c] => "a USB controller",
        _ => "another kind of device",
    };
    let [interface, subclass, base] = bytes;
    Err(NvmeErrorKind::NotNvme { class: u32::from_be_bytes([0, base, subclass, interface]), what })
}
