//! Faults on demand: what a broken controller does, so that a test can say what its user sees.
//!
//! A fault on commands waits for its `skip` matches, strikes the next `times`, and is then spent. Faults of the whole
//! controller stay until [`Machine::clear_faults`](super::Machine::clear_faults). The first fault that strikes a command has it to itself.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::lock;
use super::wire::Status;

/// Something that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Some commands end badly.
    Command {
        /// Which ones.
        on: Commands,
        /// How many of them are spared first.
        skip: u64,
        /// How many are struck after that.
        times: u64,
        /// What happens to them.
        effect: Effect,
    },
    /// The capability register (CAP) holds this. What the controller does stays as its options say.
    Capability(u64),
    /// Answers to Identify hold other bytes than they should.
    Identify {
        /// Which answers: the CNS of the command.
        cns: u8,
        /// Where in the 4096 bytes.
        offset: usize,
        /// What stands there; bytes past the end are left out.
        bytes: Vec<u8>,
    },
    /// CSTS.RDY keeps its value whatever CC.EN says; a function reset clears it, and it stays clear.
    StuckReady,
    /// A function reset fails with EIO and does nothing.
    ResetRefused,
    /// The function is gone: registers and configuration read as all ones, writes are lost, DMA and interrupts end.
    Removed,
}

impl Fault {
    /// `effect` on the next command of `on`.
    #[must_use]
    pub fn once(on: Commands, effect: Effect) -> Self {
        Self::Command { on, skip: 0, times: 1, effect }
    }

    /// `effect` on every command of `on`.
    #[must_use]
    pub fn always(on: Commands, effect: Effect) -> Self {
        Self::Command { on, skip: 0, times: u64::MAX, effect }
    }
}

/// A set of commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// Only those of this submission queue; 0 is the admin queue.
    pub queue: Option<u16>,
    /// Only those with this opcode.
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

    fn contain(self, queue: u16, opcode: u8) -> bool {
        self.queue.is_none_or(|wanted| wanted == queue) && self.opcode.is_none_or(|wanted| wanted == opcode)
    }
}

/// What happens to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It is executed, and its completion never comes.
    Lose,
    /// It is executed, and its completion comes twice.
    Twice,
    /// Its completion is written with the phase of the last round, so the host cannot see it.
    WrongPhase,
    /// Its completion carries this command identifier.
    WrongId(u16),
    /// It is not executed and ends with this status.
    Status(Status),
    /// It is executed, DMA included, so much later; see [`Machine::advance`](super::Machine::advance).
    Delay(Duration),
    /// It is executed and completed, and the vector is not signalled for it.
    LoseInterrupt,
    /// The controller does nothing any more and CSTS.RDY keeps its value, as with [`Fault::StuckReady`]; the command is
    /// lost.
    Stick,
    /// The controller stops with Controller Fatal Status before it is executed.
    Fatal,
    /// The function is gone from then on, as with [`Fault::Removed`].
    Remove,
    /// It is executed, after the namespace has got this size, bytes; see [`Machine::resize`](super::Machine::resize).
    Resize(u64),
}

struct Trap {
    on: Commands,
    skip: u64,
    times: u64,
    effect: Effect,
}

/// Answers that are not true.
#[derive(Default)]
struct Forged {
    capability: Option<u64>,
    identify: Vec<(u8, usize, Vec<u8>)>,
}

/// The faults in force.
#[derive(Default)]
pub(super) struct Faults {
    /// True while there is a trap: the data path looks at nothing else.
    armed: AtomicBool,
    traps: Mutex<Vec<Trap>>,
    forged: Mutex<Forged>,
    pub(super) stuck_ready: AtomicBool,
    pub(super) reset_refused: AtomicBool,
    pub(super) removed: AtomicBool,
}

impl Faults {
    pub(super) fn inject(&self, fault: Fault) {
        match fault {
            Fault::Command { on, skip, times, effect } => {
                lock(&self.traps).push(Trap { on, skip, times, effect });
                self.armed.store(true, SeqCst);
            }
            Fault::Capability(value) => lock(&self.forged).capability = Some(value),
            Fault::Identify { cns, offset, bytes } => lock(&self.forged).identify.push((cns, offset, bytes)),
            Fault::StuckReady => self.stuck_ready.store(true, SeqCst),
            Fault::ResetRefused => self.reset_refused.store(true, SeqCst),
            Fault::Removed => self.removed.store(true, SeqCst),
        }
    }

    pub(super) fn clear(&self) {
        self.armed.store(false, SeqCst);
        lock(&self.traps).clear();
        *lock(&self.forged) = Forged::default();
        self.stuck_ready.store(false, SeqCst);
        self.reset_refused.store(false, SeqCst);
        self.removed.store(false, SeqCst);
    }

    /// CAP as the host is to see it.
    pub(super) fn capability(&self, truth: u64) -> u64 {
        lock(&self.forged).capability.unwrap_or(truth)
    }

    /// Changes an answer to Identify.
    pub(super) fn forge(&self, cns: u8, page: &mut [u8]) {
        for (_, offset, bytes) in lock(&self.forged).identify.iter().filter(|(of, ..)| *of == cns) {
            for (place, byte) in page.iter_mut().skip(*offset).zip(bytes) {
                *place = *byte;
            }
        }
    }

    /// What strikes the command just fetched.
    #[inline]
    pub(super) fn effect_on(&self, queue: u16, opcode: u8) -> Option<Effect> {
        if self.armed.load(SeqCst) { self.effect_of_command_fault(queue, opcode) } else { None }
    }

    #[cold]
    fn effect_of_command_fault(&self, queue: u16, opcode: u8) -> Option<Effect> {
        let mut traps = lock(&self.traps);
        let mut effect = None;
        for trap in traps.iter_mut().filter(|trap| trap.on.contain(queue, opcode)) {
            if trap.skip > 0 {
                trap.skip -= 1;
            } else if effect.is_none() && trap.times > 0 {
                trap.times -= 1;
                effect = Some(trap.effect);
            }
        }
        traps.retain(|trap| trap.times > 0);
        self.armed.store(!traps.is_empty(), SeqCst);
        effect
    }
}
