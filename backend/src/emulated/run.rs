//! Command execution, from doorbell to completion, in passes over a submission queue.
//!
//! ```text
//! tail moved --> fetch --> fault? --> execute --> post --> signal the vector once per pass
//!                            |           ^
//!                            +--> hold --+  until due (latency, Effect::Delay)
//! ```
//!
//! A pass holds the queue's lock. After a thread has stopped the controller and taken that lock, no command is running.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::controller::Controller;
use super::event_state::BadDoorbell;
use super::fault::Effect;
use super::lock;
use super::queue::{Completion, Cq, CqSlot, QueueMemory, Sq, SqSlot};
use super::wire::{Entry, Status};

/// Result of a pass.
#[derive(Default)]
pub(super) struct Pass {
    /// The vector to signal.
    vector: Option<u16>,
    /// Due time of the first held command.
    due: Option<Duration>,
}

impl Controller {
    /// Executes the commands of submission queue `id`. Returns the due time of the next held command.
    #[inline]
    pub(super) fn run(&self, id: u16) -> Option<Duration> {
        let pass = if id == 0 { self.run_admin() } else { self.run_io(id) };
        self.signal(&pass);
        self.report_events();
        pass.due
    }

    /// With shared tags: the identifier is out of range, or that of an admin command.
    #[cold]
    fn tag_is_taken(&self, cid: u16) -> bool {
        cid >= self.options.queue_entries || lock(&self.admin).events.waiting.contains(&cid)
    }

    /// Signals the vector of the posted completions.
    #[inline]
    pub(super) fn signal(&self, pass: &Pass) {
        if let Some(vector) = pass.vector {
            self.interrupt(vector);
        }
    }

    /// Applies CC and runs all queues. The controller's thread calls it in a loop; enabling bus master also calls it.
    pub(super) fn run_all(&self) -> Option<Duration> {
        self.apply_configuration();
        (0..=self.options.queues).filter_map(|id| self.run(id)).min()
    }

    /// Runs the submission queues of completion queue `cq`, which has room again.
    #[cold]
    pub(super) fn run_queues_of_cq(&self, cq: u16) {
        for id in 0..=self.options.queues {
            if lock(&self.sqs[usize::from(id)].state).queue.as_ref().is_some_and(|sq| sq.cq == cq) {
                self.run(id);
            }
        }
    }

    /// Executes I/O commands until the queue is empty.
    fn run_io(&self, id: u16) -> Pass {
        let mut pass = Pass::default();
        let slot = &self.sqs[usize::from(id)];
        let mut state = lock(&slot.state);
        let state = &mut *state;
        let Some(sq) = state.queue.as_mut() else { return pass };
        let cq_slot = &self.cqs[usize::from(sq.cq)];
        let mut cq = lock(&cq_slot.queue);
        let cq = cq.as_mut().expect("a completion queue outlives its submission queues");
        let dma = self.iommu.dma();
        let (commands, completions) = (sq.memory(&dma), cq.memory(&dma));
        let mut entry = Entry::default();
        let mut taken = 0;
        while self.may_run() && self.has_work(slot, sq) && self.cq_has_room(cq_slot, cq) {
            taken += 1;
            let Some(effect) = self.take(sq, id, &commands, &mut entry) else { continue };
            let (status, result) = match effect {
                Some(Effect::Status(status)) => (status, 0),
                _ if self.options.traits.shared_tags && self.tag_is_taken(entry.cid()) => (Status::ID_CONFLICT, 0),
                _ => self.execute_io(sq, &entry, &dma, &mut state.traffic),
            };
            if status != Status::SUCCESS {
                self.log_error(id, &entry, status);
            }
            let completion = Completion { result, sq: id, sq_head: sq.head(), cid: entry.cid(), status };
            self.post(cq, &completions, completion, effect, &mut pass);
        }
        state.traffic.passes += u64::from(taken != 0);
        pass.due = sq.first_due();
        pass
    }

    /// Executes admin commands until the queue is empty. No lock of the IOMMU or the completion queue is held while a command
    /// runs: the command may wait for another queue's lock, whose pass may wait for these locks.
    fn run_admin(&self) -> Pass {
        let mut pass = Pass::default();
        let (slot, cq_slot) = (&self.sqs[0], &self.cqs[0]);
        let mut state = lock(&slot.state);
        let state = &mut *state;
        let Some(sq) = state.queue.as_mut() else { return pass };
        let room = || lock(&cq_slot.queue).as_mut().is_some_and(|cq| self.cq_has_room(cq_slot, cq));
        while self.may_run() && self.has_work(slot, sq) && room() {
            let mut entry = Entry::default();
            let dma = self.iommu.dma();
            let taken = self.take(sq, 0, &sq.memory(&dma), &mut entry);
            drop(dma);
            let Some(effect) = taken else { continue };
            state.traffic.admin += 1;
            let outcome = match effect {
                Some(Effect::Status(status)) => Some((status, 0)),
                _ => self.execute_admin(&entry, sq.head()),
            };
            let Some((status, result)) = outcome else { continue };
            if status != Status::SUCCESS {
                self.log_error(0, &entry, status);
            }
            let completion = Completion { result: result.into(), sq: 0, sq_head: sq.head(), cid: entry.cid(), status };
            self.lock_and_post(0, completion, effect, &mut pass);
        }
        pass.due = sq.first_due();
        pass
    }

    /// Locks completion queue `id` and posts a completion. If there is no room, the completion is dropped. That happens only
    /// when a queue is deleted, where the host must expect it (NVMe 2.0 §5.6); all other callers check for room first.
    pub(super) fn lock_and_post(&self, id: u16, completion: Completion, effect: Option<Effect>, pass: &mut Pass) {
        let slot = &self.cqs[usize::from(id)];
        let mut cq = lock(&slot.queue);
        let Some(cq) = cq.as_mut() else { return };
        if self.cq_has_room(slot, cq) {
            let dma = self.iommu.dma();
            self.post(cq, &cq.memory(&dma), completion, effect, pass);
        }
    }

    /// Completes the held commands of submission queue `id` whose identifier matches with `status`. Returns their number.
    pub(super) fn abort_held(&self, id: u16, status: Status, matches: impl Fn(u16) -> bool) -> usize {
        let mut pass = Pass::default();
        let mut state = lock(&self.sqs[usize::from(id)].state);
        let Some(sq) = state.queue.as_mut() else { return 0 };
        let aborted = sq.remove_held(matches);
        for entry in &aborted {
            let completion = Completion { result: 0, sq: id, sq_head: sq.head(), cid: entry.cid(), status };
            self.lock_and_post(sq.cq, completion, None, &mut pass);
        }
        self.signal(&pass);
        aborted.len()
    }

    /// True if there is an entry to fetch or a held command is due.
    #[inline]
    fn has_work(&self, slot: &SqSlot, sq: &Sq) -> bool {
        let tail = slot.tail.load(SeqCst);
        if !sq.accepts(tail) {
            self.bad_doorbell(BadDoorbell::InvalidValue);
            return false;
        }
        !sq.is_empty(tail) || sq.first_due().is_some_and(|due| due <= self.now())
    }

    /// Takes the next command to execute into `entry` and returns the injected effect. `None` if the command is held, or has
    /// stopped the controller.
    #[inline]
    fn take(&self, sq: &mut Sq, id: u16, memory: &QueueMemory<'_, 8>, entry: &mut Entry) -> Option<Option<Effect>> {
        if sq.first_due().is_some_and(|due| due <= self.now()) {
            return sq.take_first_held(entry);
        }
        if sq.fetch(memory, entry).is_err() {
            self.fatal();
            return None;
        }
        let effect = self.faults.effect_on(id, entry.opcode());
        let latency = if id == 0 { Duration::ZERO } else { self.latency.next() };
        let (wait, effect) = match effect {
            Some(Effect::Fatal) => {
                self.fatal();
                return None;
            }
            Some(Effect::Stick) => {
                self.hang();
                return None;
            }
            Some(Effect::Remove) => {
                self.remove();
                return None;
            }
            Some(Effect::Resize(bytes)) => {
                // Of the command's namespace; an admin command may have none.
                if let Err(error) = self.resize(entry.nsid().clamp(1, self.namespaces.count()), bytes) {
                    log::error!("emulated function: resize the disk to {bytes} bytes: {error}");
                }
                (latency, None)
            }
            Some(Effect::Delay(time)) => (latency.saturating_add(time), None),
            other => (latency, other),
        };
        if wait.is_zero() {
            return Some(effect);
        }
        sq.hold(self.now().saturating_add(wait), entry, effect);
        None
    }

    /// Posts a completion, modified by `effect`.
    #[inline]
    fn post(
        &self,
        cq: &mut Cq,
        memory: &QueueMemory<'_, 2>,
        mut completion: Completion,
        effect: Option<Effect>,
        pass: &mut Pass,
    ) {
        let mut posted = match effect {
            Some(Effect::Lose) => return,
            Some(Effect::WrongPhase) => cq.post_with_wrong_phase(memory, &completion),
            Some(Effect::WrongId(cid)) => {
                completion.cid = cid;
                cq.post(memory, &completion)
            }
            _ => cq.post(memory, &completion),
        };
        if effect == Some(Effect::Twice) && cq.has_room() {
            posted = posted.and(cq.post(memory, &completion));
        }
        if posted.is_err() {
            self.fatal();
        } else if effect != Some(Effect::LoseInterrupt) {
            pass.vector = cq.vector;
        }
    }

    /// True if the completion queue has room for an entry. Otherwise it is marked as starved, so that its doorbell runs the
    /// submission queues again. The second check catches a doorbell write between the first check and the mark.
    #[inline]
    pub(super) fn cq_has_room(&self, slot: &CqSlot, cq: &mut Cq) -> bool {
        for _ in 0..2 {
            if cq.set_head(slot.head.load(SeqCst)).is_err() {
                self.bad_doorbell(BadDoorbell::InvalidValue);
            }
            if cq.has_room() {
                return true;
            }
            slot.starved.store(true, SeqCst);
        }
        false
    }
}
