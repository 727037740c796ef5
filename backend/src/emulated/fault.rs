//! Fault injection: makes the controller behave like a broken one, so that tests can check how its user reacts.
//!
//! A command fault skips the first `skip` matching commands, affects the next `times`, and then expires. Faults of the whole
//! controller stay until [`Machine::clear_faults`](super::Machine::clear_faults). Only the first matching fault affects a
//! command.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::lock;
use super::wire::Status;

/// A fault to inject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A fault of some commands.
    Command {
        /// The commands that match.
        on: Commands,
        /// Number of matching commands that are not affected first.
        skip: u64,
        /// Number of matching commands that are affected afterwards.
        times: u64,
        /// What happens to an affected command.
        effect: Effect,
    },
    /// The capability register (CAP) reads as this value. The controller's behaviour does not change.
    Capability(u64),
    /// Some bytes of Identify data are replaced.
    Identify {
        /// CNS of the affected Identify commands.
        cns: u8,
        /// Offset in the 4096 bytes of data.
        offset: usize,
        /// The replacement. Bytes past the end of the data are ignored.
        bytes: Vec<u8>,
    },
    /// CSTS.RDY no longer follows CC.EN. It keeps its value until a function reset clears it for good.
    StuckReady,
    /// A function reset fails with EIO and has no effect.
    ResetRefused,
    /// Surprise removal: registers and configuration space read as all ones, writes are ignored, DMA and interrupts stop.
    Removed,
}

impl Fault {
    /// `effect` on the next command that matches `on`.
    #[must_use]
    pub fn once(on: Commands, effect: Effect) -> Self {
        Self::Command { on, skip: 0, times: 1, effect }
    }

    /// `effect` on every command that matches `on`.
    #[must_use]
    pub fn always(on: Commands, effect: Effect) -> Self {
        Self::Command { on, skip: 0, times: u64::MAX, effect }
    }
}

/// A set of commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// Only commands of this submission queue; 0 is the admin queue.
    pub queue: Option<u16>,
    /// Only commands with this opcode.
    pub opcode: Option<u8>,
}

impl Commands {
    /// Every command of the admin queue with `opcode`.
    #[must_use]
    pub fn admin(opcode: u8) -> Self {
        Self { queue: Some(0), opcode: Some(opcode) }
    }

    /// Every command of submission queue `queue`.
    #[must_use]
    pub fn of_queue(queue: u16) -> Self {
        Self { queue: Some(queue), opcode: None }
    }

    fn matches(self, queue: u16, opcode: u8) -> bool {
        self.queue.is_none_or(|wanted| wanted == queue) && self.opcode.is_none_or(|wanted| wanted == opcode)
    }
}

/// What happens to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The command is executed, but no completion is posted.
    Lose,
    /// The command is executed, and its completion is posted twice.
    Twice,
    /// The completion is posted with the wrong phase, so the host does not see it.
    WrongPhase,
    /// The completion has this command identifier.
    WrongId(u16),
    /// The command is not executed and completes with this status.
    Status(Status),
    /// The command is executed, DMA included, after this delay; see [`Machine::advance`](super::Machine::advance).
    Delay(Duration),
    /// The command is executed and completed, but no interrupt is signalled.
    LoseInterrupt,
    /// The controller hangs: the command is lost, no further command is executed, and CSTS.RDY keeps its value as with
    /// [`Fault::StuckReady`].
    Stick,
    /// The controller sets Controller Fatal Status and stops before it executes the command.
    Fatal,
    /// The function is removed, as with [`Fault::Removed`].
    Remove,
    /// The namespace gets this size in bytes, then the command is executed; see [`Machine::resize`](super::Machine::resize).
    Resize(u64),
}

struct CommandFault {
    on: Commands,
    skip: u64,
    times: u64,
    effect: Effect,
}

/// Values that replace what the controller reports.
#[derive(Default)]
struct Overrides {
    capability: Option<u64>,
    /// CNS, offset and bytes.
    identify: Vec<(u8, usize, Vec<u8>)>,
}

/// The injected faults.
#[derive(Default)]
pub(super) struct Faults {
    /// True while there are command faults. The data path checks only this flag.
    armed: AtomicBool,
    command_faults: Mutex<Vec<CommandFault>>,
    overrides: Mutex<Overrides>,
    pub(super) stuck_ready: AtomicBool,
    pub(super) reset_refused: AtomicBool,
    pub(super) removed: AtomicBool,
}

impl Faults {
    pub(super) fn inject(&self, fault: Fault) {
        match fault {
            Fault::Command { on, skip, times, effect } => {
                lock(&self.command_faults).push(CommandFault { on, skip, times, effect });
                self.armed.store(true, SeqCst);
            }
            Fault::Capability(value) => lock(&self.overrides).capability = Some(value),
            Fault::Identify { cns, offset, bytes } => lock(&self.overrides).identify.push((cns, offset, bytes)),
            Fault::StuckReady => self.stuck_ready.store(true, SeqCst),
            Fault::ResetRefused => self.reset_refused.store(true, SeqCst),
            Fault::Removed => self.removed.store(true, SeqCst),
        }
    }

    pub(super) fn clear(&self) {
        self.armed.store(false, SeqCst);
        lock(&self.command_faults).clear();
        *lock(&self.overrides) = Overrides::default();
        self.stuck_ready.store(false, SeqCst);
        self.reset_refused.store(false, SeqCst);
        self.removed.store(false, SeqCst);
    }

    /// CAP as the host reads it.
    pub(super) fn capability(&self, actual: u64) -> u64 {
        lock(&self.overrides).capability.unwrap_or(actual)
    }

    /// Applies the injected changes to Identify data.
    pub(super) fn override_identify(&self, cns: u8, page: &mut [u8]) {
        for (_, offset, bytes) in lock(&self.overrides).identify.iter().filter(|(of, ..)| *of == cns) {
            for (target, byte) in page.iter_mut().skip(*offset).zip(bytes) {
                *target = *byte;
            }
        }
    }

    /// The effect on a command that was just fetched. Counts the command for all matching faults.
    #[inline]
    pub(super) fn effect_on(&self, queue: u16, opcode: u8) -> Option<Effect> {
        if self.armed.load(SeqCst) { self.effect_of_command_fault(queue, opcode) } else { None }
    }

    #[cold]
    fn effect_of_command_fault(&self, queue: u16, opcode: u8) -> Option<Effect> {
        let mut faults = lock(&self.command_faults);
        let mut effect = None;
        for fault in faults.iter_mut().filter(|fault| fault.on.matches(queue, opcode)) {
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if effect.is_none() && fault.times > 0 {
                fault.times -= 1;
                effect = Some(fault.effect);
            }
        }
        faults.retain(|fault| fault.times > 0);
        self.armed.store(!faults.is_empty(), SeqCst);
        effect
    }
}
