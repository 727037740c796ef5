//! Errors the host is told about: the Error Information log and asynchronous events (NVMe 2.0 §5.2, §5.16.1.2).
//!
//! ```text
//! something happens --> pending --(a request waits)--> completed, masked --(its log page is read)--> may happen again
//! ```
//!
//! Two kinds of events are raised here: a doorbell write that makes no sense, and another size of the namespace.

use std::io;
use std::sync::atomic::Ordering::SeqCst;

use super::controller::Controller;
use super::event_state::{BadDoorbell, ERRORS_KEPT, EVENT_LIMIT, ErrorEntry, Notice};
use super::lock;
use super::queue::Completion;
use super::run::Pass;
use super::wire::{Entry, Status};

impl Controller {
    /// An Asynchronous Event Request: it stays until there is something to tell.
    pub(super) fn wait_for_event(&self, entry: &Entry) -> Result<(), Status> {
        let events = &mut lock(&self.admin).events;
        if events.waiting.len() == EVENT_LIMIT {
            return Err(Status::EVENT_LIMIT_EXCEEDED);
        }
        events.waiting.push(entry.cid());
        self.event_pending.store(events.pending(), SeqCst);
        Ok(())
    }

    /// Ends the waiting request `cid`. False if there is none, or no room to say so and answer the Abort.
    pub(super) fn abort_event(&self, cid: u16, sq_head: u16) -> bool {
        if lock(&self.cqs[0].queue).as_ref().is_none_or(|cq| cq.free() < 2) {
            return false;
        }
        if !lock(&self.admin).events.withdraw(cid) {
            return false;
        }
        let completion = Completion { result: 0, sq: 0, sq_head, cid, status: Status::ABORT_REQUESTED };
        self.lock_and_post(0, completion, None, &mut Pass::default());
        true
    }

    /// Records a failed command.
    #[cold]
    pub(super) fn log_error(&self, sq: u16, entry: &Entry, status: Status) {
        let events = &mut lock(&self.admin).events;
        events.error_count += 1;
        let (count, cid) = (events.error_count, entry.cid());
        events.errors.truncate(ERRORS_KEPT - 1);
        events.errors.push_front(ErrorEntry { count, sq, cid, status, lba: entry.u64(40), nsid: entry.nsid() });
    }

    /// A doorbell write without meaning changes nothing; the host is told when it asks.
    #[cold]
    pub(super) fn bad_doorbell(&self, what: BadDoorbell) {
        self.bad_doorbells.fetch_add(1, SeqCst);
        let events = &mut lock(&self.admin).events;
        if !events.masked {
            events.pending = Some(what as u32);
            self.event_pending.store(true, SeqCst);
        }
    }

    /// Gives the namespace another size. Whoever has asked for it is told when no queue is locked.
    pub(super) fn resize(&self, bytes: u64) -> io::Result<()> {
        let lba = u64::from(self.options.lba);
        if bytes == 0 || !bytes.is_multiple_of(lba) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.store.resize(bytes)?;
        self.blocks.store(bytes / lba, SeqCst);
        let admin = &mut *lock(&self.admin);
        if admin.features.notices() {
            admin.events.changed.get_or_insert(Notice::Pending);
            self.event_pending.store(true, SeqCst);
        }
        Ok(())
    }

    /// Completes a waiting request with what is pending. Called with no queue locked.
    #[inline]
    pub(super) fn report_events(&self) {
        if self.event_pending.load(SeqCst) {
            self.tell();
        }
    }

    #[cold]
    fn tell(&self) {
        let state = lock(&self.sqs[0].state);
        let Some(sq) = state.queue.as_ref().filter(|_| self.may_run()) else { return };
        if !lock(&self.cqs[0].queue).as_mut().is_some_and(|cq| self.cq_has_room(&self.cqs[0], cq)) {
            return;
        }
        let (cid, result) = {
            let events = &mut lock(&self.admin).events;
            self.event_pending.store(false, SeqCst);
            if events.waiting.is_empty() {
                return;
            }
            let Some(result) = events.tell() else { return };
            (events.waiting.remove(0), result)
        };
        let mut pass = Pass::default();
        let completion = Completion { result, sq: 0, sq_head: sq.head(), cid, status: Status::SUCCESS };
        self.lock_and_post(0, completion, None, &mut pass);
        self.signal(&pass);
    }
}
