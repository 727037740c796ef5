//! The registers in BAR 0 (NVMe 2.0 §3.1.3).
//!
//! | offset | register |
//! |---|---|
//! | 0x00 | CAP, 64 bits |
//! | 0x08 | VS |
//! | 0x0c, 0x10 | INTMS, INTMC: mask INTx; not used with MSI-X |
//! | 0x14 | CC |
//! | 0x1c | CSTS |
//! | 0x24 | AQA |
//! | 0x28, 0x30 | ASQ, ACQ, 64 bits |
//! | 0x50 | CMBMSC, 64 bits |
//! | 0x1000 + 2n·stride | tail doorbell of submission queue n; then the head doorbell of completion queue n |

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use crate::hardware::Registers;

use super::controller::Controller;
use super::event_state::BadDoorbell;
use super::lock;
use super::register_file::{CC_ENABLE, CSTS_FATAL, MPSMAX, RegisterFile, TIMEOUT, VERSION};
use super::wire::halves;
use super::worker::Worker;

const DOORBELLS: usize = 0x1000;
/// CMBMSC: CRE and CMSE, at address 100000h (NVMe 2.0 §3.1.3.14).
pub(super) const CMB_ENABLED: u64 = 0x10_0000 | 0b11;

impl Controller {
    fn capabilities(&self) -> u64 {
        let entries = u64::from(self.options.queue_entries - 1);
        let contiguous = 1 << 16;
        let nvm = 1 << 37;
        let capabilities = entries
            | contiguous
            | TIMEOUT << 24
            | u64::from(self.options.doorbell_stride) << 32
            | nvm
            | u64::from(self.options.command_set.is_some()) << 43
            | u64::from(self.options.traits.memory_buffer) << 57
            | u64::from(MPSMAX) << 52;
        self.faults.capability(capabilities)
    }

    /// Reads an aligned dword below the doorbells.
    fn register(&self, offset: usize) -> u32 {
        let registers = lock(&self.registers);
        match offset {
            0x00 => halves(self.capabilities()).0,
            0x04 => halves(self.capabilities()).1,
            0x08 => VERSION,
            0x0c | 0x10 => self.interrupts.mask(),
            0x14 => registers.cc,
            0x1c => self.csts.load(SeqCst),
            0x24 => registers.aqa,
            0x28 => halves(registers.asq).0,
            0x2c => halves(registers.asq).1,
            0x30 => halves(registers.acq).0,
            0x34 => halves(registers.acq).1,
            0x50 => halves(self.memory_buffer.load(SeqCst)).0,
            0x54 => halves(self.memory_buffer.load(SeqCst)).1,
            _ => 0,
        }
    }

    fn set_register(&self, offset: usize, value: u32) {
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let mut registers = lock(&self.registers);
        match offset {
            0x0c => self.interrupts.set_mask(value),
            0x10 => {
                drop(registers);
                self.clear_mask(value);
            }
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
            0x50 if self.options.traits.memory_buffer => {
                let old = self.memory_buffer.load(SeqCst);
                self.memory_buffer.store(old & !0xffff_ffff | u64::from(value), SeqCst);
            }
            0x54 if self.options.traits.memory_buffer => {
                let old = self.memory_buffer.load(SeqCst);
                self.memory_buffer.store(old & 0xffff_ffff | u64::from(value) << 32, SeqCst);
            }
            _ => {}
        }
    }

    /// Applies CC: enable, disable, shutdown.
    pub(super) fn apply_configuration(&self) {
        if self.faults.stuck_ready.load(SeqCst) || self.faults.removed.load(SeqCst) {
            return;
        }
        let mut registers = lock(&self.registers);
        let enable = registers.cc & CC_ENABLE != 0;
        if enable && !registers.enabled {
            registers.enabled = true;
            self.go_blind();
            if !self.enable(&registers) {
                self.csts.store(CSTS_FATAL, SeqCst);
            }
        }
        if !enable && registers.enabled {
            registers.enabled = false;
            self.go_blind();
            self.disable();
            self.csts.store(0, SeqCst);
        }
        let shutdown = registers.cc >> 14 & 0b11 != 0;
        if shutdown && !registers.shutting_down {
            self.shut_down();
        }
        registers.shutting_down = shutdown;
    }

    /// Lets all registers read as ones for a while.
    fn go_blind(&self) {
        let delay = self.options.traits.ready_delay;
        if !delay.is_zero() {
            *lock(&self.blind_until) = self.now().saturating_add(delay);
        }
    }

    fn is_blind(&self) -> bool {
        !self.options.traits.ready_delay.is_zero() && self.now() < *lock(&self.blind_until)
    }

    /// Resets registers, queues and settings to the power-on state.
    pub(super) fn reset_registers(&self) {
        let mut registers = lock(&self.registers);
        *registers = RegisterFile::default();
        self.disable();
        self.csts.store(0, SeqCst);
    }

    /// Handles a write at or above the first doorbell.
    #[inline]
    fn write_doorbell(&self, offset: usize, value: u32) {
        let index = (offset - DOORBELLS) >> (2 + self.options.doorbell_stride);
        let (id, is_head) = (index / 2, index % 2 == 1);
        let on_stride = offset.is_multiple_of(4 << self.options.doorbell_stride);
        let Ok(id) = u16::try_from(id) else { return };
        let exists = id <= self.options.queues && on_stride;
        let open = |id: usize| if is_head { self.cqs[id].open.load(SeqCst) } else { self.sqs[id].open.load(SeqCst) };
        if !exists || !open(id.into()) {
            self.bad_doorbell(BadDoorbell::InvalidRegister);
            self.wake(Self::report_events);
            return;
        }
        let value = value & 0xffff;
        if is_head {
            let slot = &self.cqs[usize::from(id)];
            slot.head.store(value, SeqCst);
            if slot.starved.load(SeqCst) && slot.starved.swap(false, SeqCst) {
                self.wake(|this| this.run_queues_of_cq(id));
            }
        } else {
            self.sqs[usize::from(id)].tail.store(value, SeqCst);
            self.wake(|this| {
                this.run(id);
            });
        }
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
    /// Checks bounds and alignment. False if the function does not decode the access.
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
        if !self.check(offset, 4) || self.controller.is_blind() {
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
            self.controller.write_doorbell(offset, value);
        }
    }

    fn write64(&self, offset: usize, value: u64) {
        let (low, high) = halves(value);
        self.write32(offset, low);
        self.write32(offset + 4, high);
    }
}
