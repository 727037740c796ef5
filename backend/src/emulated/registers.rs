//! The register block behind BAR 0 (NVMe 2.0 §3.1.3).
//!
//! | offset | register |
//! |---|---|
//! | 0x00 | CAP, 64 bits |
//! | 0x08 | VS |
//! | 0x0c, 0x10 | INTMS, INTMC: not used with MSI-X |
//! | 0x14 | CC |
//! | 0x1c | CSTS |
//! | 0x24 | AQA |
//! | 0x28, 0x30 | ASQ, ACQ, 64 bits |
//! | 0x1000 + 2n·stride | tail doorbell of submission queue n; then the head doorbell of completion queue n |

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use crate::hardware::Registers;

use super::controller::Controller;
use super::events::BadDoorbell;
use super::function::Worker;
use super::lock;
use super::wire::halves;

/// CAP.TO: how long a host waits for CSTS.RDY, units of 500 ms.
const TIMEOUT: u64 = 2;
/// CAP.MPSMAX: largest page is `4096 << MPSMAX` bytes.
const MPSMAX: u32 = 4;
/// Version 1.4: the newest whose mandatory features are all here (2.0 adds log pages and CRTO).
pub(super) const VERSION: u32 = 0x0001_0400;

const CC_ENABLE: u32 = 1;
/// CSTS.RDY.
pub(super) const CSTS_READY: u32 = 1;
/// CSTS.CFS.
pub(super) const CSTS_FATAL: u32 = 1 << 1;
/// CSTS.SHST.
pub(super) const CSTS_SHUTDOWN_MASK: u32 = 0b11 << 2;
/// CSTS.SHST: shutdown processing complete.
pub(super) const CSTS_SHUTDOWN_DONE: u32 = 0b10 << 2;

const DOORBELLS: usize = 0x1000;

/// The registers a host can write, and what the controller has made of them.
#[derive(Default)]
pub(super) struct RegisterFile {
    cc: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    enabled: bool,
    shutting_down: bool,
}

impl RegisterFile {
    /// CC.MPS in bytes, if CAP allows it.
    pub(super) fn page(&self) -> Option<u32> {
        let mps = self.cc >> 7 & 0b1111;
        (mps <= MPSMAX).then(|| 4096 << mps)
    }

    /// CC.CSS: the NVM command set; and CC.AMS: round robin.
    pub(super) fn command_set_is_nvm(&self) -> bool {
        self.cc >> 4 & 0b111 == 0 && self.cc >> 11 & 0b111 == 0
    }

    /// CC.IOSQES and CC.IOCQES are 64 and 16 bytes.
    pub(super) fn entry_sizes_are_set(&self) -> bool {
        self.cc >> 16 & 0b1111 == 6 && self.cc >> 20 & 0b1111 == 4
    }

    /// Base and number of entries of the admin submission queue.
    pub(super) fn admin_sq(&self) -> (u64, u32) {
        (self.asq, (self.aqa & 0xfff) + 1)
    }

    /// Base and number of entries of the admin completion queue.
    pub(super) fn admin_cq(&self) -> (u64, u32) {
        (self.acq, (self.aqa >> 16 & 0xfff) + 1)
    }
}

impl Controller {
    fn capabilities(&self) -> u64 {
        let entries = u64::from(self.options.queue_entries - 1);
        let contiguous = 1 << 16;
        let nvm = 1 << 37;
        let truth = entries
            | contiguous
            | TIMEOUT << 24
            | u64::from(self.options.doorbell_stride) << 32
            | nvm
            | u64::from(MPSMAX) << 52;
        self.faults.capability(truth)
    }

    /// One aligned dword below the doorbells.
    fn register(&self, offset: usize) -> u32 {
        let registers = lock(&self.registers);
        match offset {
            0x00 => halves(self.capabilities()).0,
            0x04 => halves(self.capabilities()).1,
            0x08 => VERSION,
            0x14 => registers.cc,
            0x1c => self.csts.load(SeqCst),
            0x24 => registers.aqa,
            0x28 => halves(registers.asq).0,
            0x2c => halves(registers.asq).1,
            0x30 => halves(registers.acq).0,
            0x34 => halves(registers.acq).1,
            _ => 0,
        }
    }

    fn set_register(&self, offset: usize, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let mut registers = lock(&self.registers);
        match offset {
            0x14 => {
                registers.cc = value;
                self.entry_sizes_set.store(registers.entry_sizes_are_set(), SeqCst);
                drop(registers);
                self.wake(Self::apply_configuration);
            }
            0x24 => registers.aqa = value & 0x0fff_0fff,
            0x28 => registers.asq = low(registers.asq),
            0x2c => registers.asq = high(registers.asq),
            0x30 => registers.acq = low(registers.acq),
            0x34 => registers.acq = high(registers.acq),
            _ => {}
        }
    }

    /// Follows CC: enable, disable, shutdown.
    pub(super) fn apply_configuration(&self) {
        if self.faults.stuck_ready.load(SeqCst) || self.faults.removed.load(SeqCst) {
            return;
        }
        let mut registers = lock(&self.registers);
        let enable = registers.cc & CC_ENABLE != 0;
        if enable && !registers.enabled {
            registers.enabled = true;
            if !self.enable(&registers) {
                self.csts.store(CSTS_FATAL, SeqCst);
            }
        }
        if !enable && registers.enabled {
            registers.enabled = false;
            self.disable();
            self.csts.store(0, SeqCst);
        }
        let shutdown = registers.cc >> 14 & 0b11 != 0;
        if shutdown && !registers.shutting_down {
            self.shut_down();
        }
        registers.shutting_down = shutdown;
    }

    /// Back to power-on: registers, queues, settings.
    pub(super) fn reset_registers(&self) {
        let mut registers = lock(&self.registers);
        *registers = RegisterFile::default();
        self.disable();
        self.csts.store(0, SeqCst);
    }

    /// A write at or above the doorbells.
    #[inline]
    fn ring(&self, offset: usize, value: u32) {
        let index = (offset - DOORBELLS) >> (2 + self.options.doorbell_stride);
        let (id, is_head) = (index / 2, index % 2 == 1);
        let on_stride = offset.is_multiple_of(4 << self.options.doorbell_stride);
        let Ok(id) = u16::try_from(id) else { return };
        let known = id <= self.options.queues && on_stride;
        let open = |id: usize| if is_head { self.cqs[id].open.load(SeqCst) } else { self.sqs[id].open.load(SeqCst) };
        if !known || !open(id.into()) {
            self.bad_doorbell(BadDoorbell::NoQueue);
            self.wake(Self::tell_events);
            return;
        }
        let value = value & 0xffff;
        if is_head {
            let slot = &self.cqs[usize::from(id)];
            slot.head.store(value, SeqCst);
            if slot.starved.load(SeqCst) && slot.starved.swap(false, SeqCst) {
                self.wake(|this| this.run_fed_by(id));
            }
        } else {
            self.sqs[usize::from(id)].tail.store(value, SeqCst);
            self.wake(|this| {
                this.run(id);
            });
        }
    }
}

/// Layout of BAR 0.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Size, a power of two.
    pub(super) size: u32,
    /// Where the MSI-X table starts.
    pub(super) table: u32,
}

impl Layout {
    pub(super) fn new(queues: u16, vectors: u16, stride: u8) -> Self {
        let doorbells = (u32::from(queues) + 1) * 2 * (4 << stride);
        let table = (0x1000 + doorbells).next_multiple_of(0x1000);
        let end = table + u32::from(vectors) * 16 + 0x1000;
        Self { size: end.next_power_of_two(), table }
    }
}

/// BAR 0.
pub(super) struct Bar {
    pub(super) controller: Arc<Controller>,
    pub(super) size: usize,
    /// Keeps the controller's thread running.
    pub(super) _worker: Option<Arc<Worker>>,
}

impl Bar {
    #[inline]
    fn check(&self, offset: usize, width: usize) -> bool {
        assert!(
            offset.is_multiple_of(width) && offset <= self.size && width <= self.size - offset,
            "register of {width} bytes at {offset:#x} of {:#x}",
            self.size
        );
        self.controller.decoding.load(SeqCst) && !self.controller.faults.removed.load(SeqCst)
    }
}

impl Registers for Bar {
    fn size(&self) -> usize {
        self.size
    }

    fn read32(&self, offset: usize) -> u32 {
        if !self.check(offset, 4) {
            return u32::MAX;
        }
        if offset < DOORBELLS { self.controller.register(offset) } else { 0 }
    }

    fn read64(&self, offset: usize) -> u64 {
        if !self.check(offset, 8) {
            return u64::MAX;
        }
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    #[inline]
    fn write32(&self, offset: usize, value: u32) {
        if !self.check(offset, 4) {
            return;
        }
        if offset < DOORBELLS {
            self.controller.set_register(offset, value);
        } else {
            self.controller.ring(offset, value);
        }
    }

    fn write64(&self, offset: usize, value: u64) {
        let (low, high) = halves(value);
        self.write32(offset, low);
        self.write32(offset + 4, high);
    }
}
