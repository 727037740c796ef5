//! Asynchronous events and the Error Information log (NVMe 2.0 §5.2, §5.16.1.2).
//!
//! ```text
//! event --> pending --(a request is outstanding)--> reported, masked --(its log page is read)--> unmasked
//! ```
//!
//! There are two kinds of events: an invalid doorbell write, and a change of a namespace's size.

use std::io;
use std::sync::atomic::Ordering::SeqCst;

use super::controller::Controller;
use super::event_state::{BadDoorbell, ERRORS_KEPT, EVENT_LIMIT, ErrorEntry};
use super::lock;
use super::queue::Completion;
use super::run::Pass;
use super::wire::{Entry, Status};

impl Controller {
    /// Asynchronous Event Request: it stays outstanding until there is an event to report.
    pub(super) fn wait_for_event(&self, entry: &Entry) -> Result<(), Status> {
        let events = &mut lock(&self.admin).events;
        if events.waiting.len() == EVENT_LIMIT {
            return Err(Status::EVENT_LIMIT_EXCEEDED);
        }
        events.waiting.push(entry.cid());
        self.event_pending.store(events.pending(), SeqCst);
        Ok(())
    }

    /// Aborts the outstanding request `cid`. False if there is none, or if the completion queue has no room for the request's
    /// completion and that of the Abort.
    pub(super) fn abort_event(&self, cid: u16, sq_head: u16) -> bool {
        if lock(&self.cqs[0].queue).as_ref().is_none_or(|cq| cq.free() < 2) {
            return false;
        }
        if !lock(&self.admin).events.remove_request(cid) {
            return false;
        }
        let completion = Completion { result: 0, sq: 0, sq_head, cid, status: Status::ABORT_REQUESTED };
        self.lock_and_post(0, completion, None, &mut Pass::default());
        true
    }

    /// Adds a failed command to the error log.
    #[cold]
    pub(super) fn log_error(&self, sq: u16, entry: &Entry, status: Status) {
        let events = &mut lock(&self.admin).events;
        events.error_count += 1;
        let (count, cid) = (events.error_count, entry.cid());
        events.errors.truncate(ERRORS_KEPT - 1);
        events.errors.push_front(ErrorEntry { count, sq, cid, status, lba: entry.u64(40), nsid: entry.nsid() });
    }

    /// Handles an invalid doorbell write. It changes nothing except that an error event becomes pending.
    #[cold]
    pub(super) fn bad_doorbell(&self, event: BadDoorbell) {
        self.bad_doorbells.fetch_add(1, SeqCst);
        let events = &mut lock(&self.admin).events;
        if !events.masked {
            events.pending = Some(event as u32);
            self.event_pending.store(true, SeqCst);
        }
    }

    /// Changes the size of namespace `id`, in bytes. If the host has enabled notices, one becomes pending; it is reported later,
    /// when no queue is locked.
    pub(super) fn resize(&self, id: u32, bytes: u64) -> io::Result<()> {
        let lba = u64::from(self.options.lba);
        if bytes == 0 || !bytes.is_multiple_of(lba) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.namespaces.resize(id, bytes, self.options.lba, &self.store)?;
        let admin = &mut *lock(&self.admin);
        if admin.features.notices() {
            admin.events.change(id);
            self.event_pending.store(true, SeqCst);
        }
        Ok(())
    }

    /// Completes an outstanding request with a pending event. The caller must not hold a queue's lock.
    #[inline]
    pub(super) fn report_events(&self) {
        if self.event_pending.load(SeqCst) {
            self.report_one();
        }
    }

    #[cold]
    fn report_one(&self) {
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
            let Some(result) = events.take_next() else { return };
            (events.waiting.remove(0), result)
        };
        let mut pass = Pass::default();
        let completion = Completion { result: result.into(), sq: 0, sq_head: sq.head(), cid, status: Status::SUCCESS };
        self.lock_and_post(0, completion, None, &mut pass);
        self.signal(&pass);
    }
}
