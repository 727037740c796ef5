//! The controller as a whole: its registers, its running state, and all memory it may reach.
//!
//! ```text
//!              enable()                       disable()
//!  Stopped ----------------> Running  ----------------------------> Stopped
//!  no bus mastering          may DMA into      CC.EN = 0 and RDY = 0, else reset;
//!  no memory                 `memory`          then bus master off, then memory dropped
//! ```
//!
//! Queue memory has one keeper, this one, and is dropped at one place, `stop`, which the destructor calls too: so on every
//! path, including each early return while the controller is brought up, it has stopped before its memory goes away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::Cause;
use super::queue::Doorbells;
use super::regs::{
    ACQ, AQA, ASQ, CAP, CC, CC_EN, CC_SETTINGS, CC_SHN_MASK, CC_SHN_NORMAL, CRTO, CSTS, Capabilities, ControllerStatus,
    DOORBELLS, PAGE, VS, Version, registers_needed,
};
use super::rings::Shared;
use crate::addr::{Address, Iova};
use crate::hardware::{AddressSpace, DmaBuffer, Function, Registers};

/// Waits in steps: at first as short as a healthy controller needs.
const STEP: Duration = Duration::from_micros(50);
const LONG_STEP: Duration = Duration::from_millis(1);

/// Calls `look` until it finds something or `limit` has passed.
pub(super) fn poll<T>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>, Cause>) -> Result<Option<T>, Cause> {
    let start = Instant::now();
    loop {
        // Time is read before the look, so the last look comes after the limit: a process that was not scheduled for a
        // while does not blame the controller.
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

/// Where the admin queues are.
pub(super) struct AdminRings {
    pub(super) submissions: Iova,
    pub(super) completions: Iova,
    /// Entries of each.
    pub(super) size: u16,
}

/// One controller and what it may reach.
pub(super) struct Controller {
    function: Arc<dyn Function>,
    space: Arc<dyn AddressSpace>,
    registers: Arc<dyn Registers>,
    capabilities: Capabilities,
    memory: Vec<DmaBuffer>,
    /// True from the moment it may start DMA.
    running: bool,
}

impl Controller {
    /// Maps the registers of `function` and checks what they say; DMA is off afterwards.
    pub(super) fn open(function: Arc<dyn Function>, space: Arc<dyn AddressSpace>) -> Result<Self, Cause> {
        check_class(&*function)?;
        function.set_bus_master(false).map_err(Cause::function("turn bus mastering off"))?;
        let registers = function.registers(0).map_err(Cause::function("map the registers (BAR 0)"))?;
        // At least the admin queue's doorbells, in the densest layout.
        if registers.size() < DOORBELLS + 8 {
            return Err(Cause::Unsuitable {
                property: "size of the registers (BAR 0)",
                found: format!("{} bytes", registers.size()),
                wanted: "4104 bytes or more",
            });
        }
        let capabilities = Capabilities(registers.read64(CAP));
        let controller = Self { function, space, registers, capabilities, memory: Vec::new(), running: false };
        controller.check_capabilities()?;
        Ok(controller)
    }

    fn check_capabilities(&self) -> Result<(), Cause> {
        let cap = self.capabilities;
        let unsuitable = |property, found, wanted| Err(Cause::Unsuitable { property, found, wanted });
        if cap.is_gone() {
            return Err(Cause::Gone);
        }
        if !cap.nvm_command_set() {
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

    /// The function behind it.
    pub(super) fn function(&self) -> &dyn Function {
        &*self.function
    }

    /// CAP.
    pub(super) fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// VS.
    pub(super) fn version(&self) -> Version {
        Version(self.registers.read32(VS))
    }

    /// CSTS, if the controller is still there.
    pub(super) fn status(&self) -> Result<ControllerStatus, Cause> {
        let status = ControllerStatus(self.registers.read32(CSTS));
        if status.is_gone() { Err(Cause::Gone) } else { Ok(status) }
    }

    /// Where queues are announced.
    pub(super) fn doorbells(&self) -> Doorbells {
        Doorbells { registers: Arc::clone(&self.registers), stride: self.capabilities.doorbell_stride() }
    }

    /// The highest queue identifier whose doorbells the registers have room for.
    pub(super) fn last_queue(&self) -> u16 {
        let stride = self.capabilities.doorbell_stride();
        let fits = (self.registers.size() - DOORBELLS) / (2 * stride);
        u16::try_from(fits.saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// Zeroed memory for `what`, kept until the controller has stopped.
    pub(super) fn memory(&mut self, what: &'static str, bytes: usize) -> Result<Shared, Cause> {
        let buffer = self.space.buffer(bytes).map_err(|source| Cause::Memory { what, source })?;
        assert!(buffer.span().start().is_aligned(PAGE), "queue memory at {}", buffer.span());
        let shared = Shared::of(&buffer, self.space.caches());
        self.memory.push(buffer);
        Ok(shared)
    }

    fn ready_timeout(&self) -> Duration {
        self.capabilities.ready_timeout(|| self.registers.read32(CRTO))
    }

    /// Waits until CSTS is as wanted.
    fn wait(
        &self,
        condition: &'static str,
        limit: Duration,
        reached: impl Fn(ControllerStatus) -> bool,
    ) -> Result<(), Cause> {
        let found = poll(limit, || Ok(Some(self.status()?).filter(|status| reached(*status))))?;
        if found.is_some() {
            return Ok(());
        }
        Err(Cause::NotReached { condition, limit, status: format!("{:?}", self.status()?) })
    }

    /// CC.EN = 0, and waits until the controller has noticed. NVMe 2.0 §3.7.2
    pub(super) fn disable(&self) -> Result<(), Cause> {
        let limit = self.ready_timeout();
        let configuration = self.registers.read32(CC);
        if configuration & CC_EN != 0 {
            // Clearing EN while RDY has not followed it yet is undefined. NVMe 2.0 §3.1.3.5
            let settled =
                self.wait("CSTS.RDY = 1", limit, |status| status.ready() || status.fatal() || status.shutting_down());
            if let Err(error @ Cause::NotReached { .. }) = &settled {
                log::warn!("{}: {error}; disabling it all the same", self.function.name());
            } else {
                settled?;
            }
            self.registers.write32(CC, configuration & !(CC_EN | CC_SHN_MASK));
        }
        self.wait("CSTS.RDY = 0", limit, |status| !status.ready())
    }

    /// Brings the disabled controller to life with its admin queues. NVMe 2.0 §3.5.1
    pub(super) fn enable(&mut self, admin: &AdminRings) -> Result<(), Cause> {
        let last = u32::from(admin.size - 1);
        self.registers.write32(AQA, last << 16 | last);
        self.registers.write64(ASQ, admin.submissions.raw());
        self.registers.write64(ACQ, admin.completions.raw());
        self.registers.write32(CC, CC_SETTINGS);
        self.running = true;
        self.function.set_bus_master(true).map_err(Cause::function("turn bus mastering on"))?;
        self.registers.write32(CC, CC_SETTINGS | CC_EN);
        self.wait("CSTS.RDY = 1", self.ready_timeout(), |status| status.ready() || status.fatal())?;
        let status = self.status()?;
        if status.fatal() { Err(Cause::fatal(status)) } else { Ok(()) }
    }

    /// Normal shutdown: the controller makes its data durable. NVMe 2.0 §3.6.1
    pub(super) fn notify_shutdown(&self, limit: Duration) -> Result<(), Cause> {
        let configuration = self.registers.read32(CC);
        self.registers.write32(CC, configuration & !CC_SHN_MASK | CC_SHN_NORMAL);
        self.wait("CSTS.SHST = 10b (shutdown complete)", limit, ControllerStatus::shutdown_complete)
    }

    /// Ends all DMA and gives the memory back. When this fails, DMA could not be ruled out and the memory stays mapped.
    pub(super) fn stop(&mut self) -> Result<(), Cause> {
        if !self.running {
            self.memory.clear();
            return Ok(());
        }
        let disabled = self.disable();
        let bus_master_off = self.function.set_bus_master(false).map_err(Cause::function("turn bus mastering off"));
        let reset = match &disabled {
            Ok(()) => Ok(()),
            Err(error) => {
                log::warn!("{}: {error}; resetting the function", self.function.name());
                self.function.reset().map_err(Cause::function("reset the function"))
            }
        };
        if let Err(error) = &reset {
            log::error!("{}: {error}", self.function.name());
        }
        if let Err(error) = self.function.route_vectors(&[]) {
            log::debug!("{}: turn MSI-X off: {error}", self.function.name());
        }
        // Either is enough for nothing more to be written: the controller disabled or its function reset (which turns bus
        // mastering off, too), or bus mastering off.
        if let Err(error) = bus_master_off {
            if reset.is_err() {
                let kept = self.memory.drain(..).map(std::mem::forget).count();
                log::error!("{}: may still do DMA; {kept} buffers stay mapped", self.function.name());
                return Err(error);
            }
            log::warn!("{}: {error}", self.function.name());
        }
        self.running = false;
        self.memory.clear();
        Ok(())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("{}: {error}", self.function.name());
        }
    }
}

/// Refuses a function that is not an NVMe I/O controller: class code 01h 08h 02h. NVMe over PCIe
/// Transport 1.0, PCI header register "Class Code"
fn check_class(function: &dyn Function) -> Result<(), Cause> {
    let mut bytes = [0; 3];
    function.config_read(0x09, &mut bytes).map_err(Cause::function("read the class code"))?;
    let what = match bytes {
        [0x02, 0x08, 0x01] => return Ok(()),
        [0xff, 0xff, 0xff] => return Err(Cause::Gone),
        [_, 0x08, 0x01] => "an NVMe function that is no I/O controller",
        [_, _, 0x01] => "another kind of storage controller",
        [_, _, 0x02] => "a network controller",
        [_, _, 0x03] => "a display controller",
        [_, _, 0x04] => "a multimedia device",
        [_, _, 0x06] => "a bridge",
        [_, 0x03, 0x0c] => "a USB controller",
        _ => "another kind of device",
    };
    let [interface, subclass, base] = bytes;
    Err(Cause::NotNvme { class: u32::from_be_bytes([0, base, subclass, interface]), what })
}
