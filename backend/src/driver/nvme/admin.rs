//! The admin queue: one command at a time, completed by polling.
//!
//! Admin commands are issued during initialization and shutdown, and rarely in between. More than one in flight, or an
//! interrupt per command, would gain nothing. The exception is the Asynchronous Event Request, which stays outstanding.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::controller::{AdminRings, Controller, poll};
use super::error::NvmeErrorKind;
use super::regs::PAGE_LEN;
use super::rings::{CompletionRing, CompletionWatch, QueueMemory, SubmissionRing, completion_bytes, submission_bytes};
use super::spec::{CompletionEntry, NAMESPACE_NOTICES, SubmissionEntry, admin_opcode, feature};
use super::status::Status;
use super::tags::ADMIN_TAGS;
use crate::driver::CommandId;
use crate::rate_limited_log::RateLimitedLog;

/// Entries of each admin ring. Only commands that timed out and the event request stay outstanding.
const SIZE: u16 = ADMIN_TAGS;

/// An admin command and its name in the specification.
pub(super) struct AdminCommand {
    pub(super) name: &'static str,
    pub(super) entry: SubmissionEntry,
}

impl AdminCommand {
    /// NVMe 2.0 §5.17. [`AdminQueue::identify`] sets the data pointer.
    pub(super) fn identify(name: &'static str, cns: u32, nsid: u32) -> Self {
        Self { name, entry: SubmissionEntry { opcode: admin_opcode::IDENTIFY, nsid, cdw10: cns, ..Default::default() } }
    }

    /// NVMe 2.0 §5.17, for a data structure of the command set `set` (CSI).
    pub(super) fn identify_of_set(name: &'static str, cns: u32, nsid: u32, set: u8) -> Self {
        let mut command = Self::identify(name, cns, nsid);
        command.entry.cdw11 = u32::from(set) << 24;
        command
    }

    /// NVMe 2.0 §5.27.1.5: requests `count` I/O queue pairs (the field is 0's based).
    pub(super) fn set_number_of_queues(count: u16) -> Self {
        let wanted = u32::from(count) - 1;
        let entry = SubmissionEntry {
            opcode: admin_opcode::SET_FEATURES,
            cdw10: feature::NUMBER_OF_QUEUES,
            cdw11: wanted << 16 | wanted,
            ..Default::default()
        };
        Self { name: "Set Features (Number of Queues)", entry }
    }

    /// NVMe 2.0 §5.27.1.4: bit 0 of the result is WCE.
    pub(super) fn get_volatile_write_cache() -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::GET_FEATURES,
            cdw10: feature::VOLATILE_WRITE_CACHE,
            ..Default::default()
        };
        Self { name: "Get Features (Volatile Write Cache)", entry }
    }

    /// NVMe 2.0 §5.1: bit 0 of the result is 1 if the command was not aborted.
    pub(super) fn abort(id: CommandId) -> Self {
        let CommandId { queue, command } = id;
        let cdw10 = u32::from(command) << 16 | u32::from(queue);
        Self { name: "Abort", entry: SubmissionEntry { opcode: admin_opcode::ABORT, cdw10, ..Default::default() } }
    }

    /// NVMe 2.0 §5.27.1.4: bit 0 is WCE.
    pub(super) fn set_volatile_write_cache(on: bool) -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::SET_FEATURES,
            cdw10: feature::VOLATILE_WRITE_CACHE,
            cdw11: u32::from(on),
            ..Default::default()
        };
        Self { name: "Set Features (Volatile Write Cache)", entry }
    }

    /// NVMe 2.0 §5.27.1.8: enables namespace attribute notices only, no health events.
    pub(super) fn set_async_events() -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::SET_FEATURES,
            cdw10: feature::ASYNC_EVENTS,
            cdw11: NAMESPACE_NOTICES,
            ..Default::default()
        };
        Self { name: "Set Features (Asynchronous Event Configuration)", entry }
    }

    /// NVMe 2.0 §5.16: reads one page of the log. Reading the log re-enables the events that refer to it.
    fn get_log_page(id: u8) -> Self {
        let dwords = u32::try_from(PAGE_LEN / 4 - 1).expect("a page");
        let cdw10 = dwords << 16 | u32::from(id);
        let entry = SubmissionEntry { opcode: admin_opcode::GET_LOG_PAGE, nsid: u32::MAX, cdw10, ..Default::default() };
        Self { name: "Get Log Page", entry }
    }

    /// NVMe 2.0 §5.16.1.3: the health of the whole controller, 512 bytes. The events that refer to it stay as they are (RAE).
    pub(super) fn get_health() -> Self {
        const HEALTH_LOG: u8 = 0x02;
        const RETAIN_EVENT: u32 = 1 << 15;
        const DWORDS: u32 = 512 / 4 - 1;
        let mut command = Self::get_log_page(HEALTH_LOG);
        command.name = "Get Log Page (SMART / Health Information)";
        command.entry.cdw10 = DWORDS << 16 | RETAIN_EVENT | u32::from(HEALTH_LOG);
        command
    }

    /// NVMe 2.0 §5.16.1.13: the state of each ANA group, without its namespaces (RGO).
    pub(super) fn get_path_states() -> Self {
        const ANA_LOG: u8 = 0x0c;
        const GROUPS_ONLY: u32 = 1 << 8;
        let mut command = Self::get_log_page(ANA_LOG);
        command.name = "Get Log Page (Asymmetric Namespace Access)";
        command.entry.cdw10 |= GROUPS_ONLY;
        command
    }

    /// NVMe 2.0 §5.4: physically contiguous, with interrupts on `vector`, or without.
    pub(super) fn create_completion_queue(id: u16, depth: u16, memory: u64, vector: Option<u16>) -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::CREATE_IO_CQ,
            prp1: memory,
            cdw10: u32::from(depth - 1) << 16 | u32::from(id),
            cdw11: u32::from(vector.unwrap_or(0)) << 16 | u32::from(vector.is_some()) << 1 | 1,
            ..Default::default()
        };
        Self { name: "Create I/O Completion Queue", entry }
    }

    /// NVMe 2.0 §5.5: physically contiguous, using the completion queue with the same identifier.
    pub(super) fn create_submission_queue(id: u16, depth: u16, memory: u64) -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::CREATE_IO_SQ,
            prp1: memory,
            cdw10: u32::from(depth - 1) << 16 | u32::from(id),
            cdw11: u32::from(id) << 16 | 1,
            ..Default::default()
        };
        Self { name: "Create I/O Submission Queue", entry }
    }

    /// NVMe 2.0 §5.7.
    pub(super) fn delete_submission_queue(id: u16) -> Self {
        Self::delete("Delete I/O Submission Queue", admin_opcode::DELETE_IO_SQ, id)
    }

    /// NVMe 2.0 §5.6.
    pub(super) fn delete_completion_queue(id: u16) -> Self {
        Self::delete("Delete I/O Completion Queue", admin_opcode::DELETE_IO_CQ, id)
    }

    fn delete(name: &'static str, opcode: u8, id: u16) -> Self {
        Self { name, entry: SubmissionEntry { opcode, cdw10: u32::from(id), ..Default::default() } }
    }
}

/// The admin queue pair and one data page.
pub(super) struct AdminQueue {
    submissions: SubmissionRing,
    completions: CompletionRing,
    /// Follows `completions`, for a worker that shares this queue's interrupt.
    position: Arc<AtomicU32>,
    data: QueueMemory,
    next_cid: u16,
    /// Identifiers are below this. FFFFh is reserved for "no command". NVMe 2.0 §3.3.3.1
    cid_end: u16,
    /// Identifier of the outstanding Asynchronous Event Request.
    event_request: Option<u16>,
    /// Dword 0 of its completion, until [`Self::next_event`] returns it.
    event_result: Option<u32>,
    /// For what a misbehaving controller can cause.
    log: RateLimitedLog,
}

impl AdminQueue {
    /// Allocates the queue of a disabled controller; also returns the ring addresses for [`Controller::enable`].
    pub(super) fn new(controller: &mut Controller) -> Result<(Self, AdminRings), NvmeErrorKind> {
        let size = SIZE.min(u16::try_from(controller.capabilities().max_queue_entries()).unwrap_or(SIZE));
        let (sq_bytes, cq_bytes) = (submission_bytes(size), completion_bytes(size));
        let memory = controller.memory("the admin queue", sq_bytes + cq_bytes + PAGE_LEN)?;
        let submissions = memory.slice(0, sq_bytes);
        let completions = memory.slice(sq_bytes, cq_bytes);
        let rings = AdminRings { submissions: submissions.iova, completions: completions.iova, size };
        let doorbells = controller.doorbells();
        let completions = CompletionRing::new(&completions, 0, size, &doorbells);
        let queue = Self {
            submissions: SubmissionRing::new(&submissions, 0, size, &doorbells),
            position: Arc::new(completions.position().into()),
            completions,
            data: memory.slice(sq_bytes + cq_bytes, PAGE_LEN),
            next_cid: 0,
            cid_end: u16::MAX,
            event_request: None,
            event_result: None,
            log: RateLimitedLog::new(module_path!()),
        };
        Ok((queue, rings))
    }

    /// Executes `command` and returns dword 0 of its completion.
    pub(super) fn execute(
        &mut self,
        controller: &Controller,
        command: AdminCommand,
        limit: Duration,
    ) -> Result<u32, NvmeErrorKind> {
        let name = command.name;
        let cid = self.submit(command)?;
        let answer = poll(limit, || {
            let answer = self.completion_of(cid);
            if answer.is_none() {
                let status = controller.status()?;
                if status.fatal() {
                    return Err(NvmeErrorKind::fatal(status));
                }
            }
            Ok(answer)
        })?;
        let (result, status) = answer.ok_or(NvmeErrorKind::CommandTimeout { command: name, limit })?;
        if status.is_success() { Ok(result) } else { Err(NvmeErrorKind::CommandFailed { command: name, status }) }
    }

    /// Submits `command` and returns its identifier.
    fn submit(&mut self, AdminCommand { name, mut entry }: AdminCommand) -> Result<u16, NvmeErrorKind> {
        if self.submissions.is_full() {
            return Err(NvmeErrorKind::CommandTimeout { command: name, limit: Duration::ZERO });
        }
        entry.cid = self.next_cid;
        let next = |cid: u16| (cid + 1) % self.cid_end;
        self.next_cid = next(entry.cid);
        if self.event_request == Some(self.next_cid) {
            self.next_cid = next(self.next_cid);
        }
        self.submissions.push(&entry);
        self.submissions.ring();
        Ok(entry.cid)
    }

    /// Uses identifiers below [`ADMIN_TAGS`] only, and returns how many entries an I/O queue may have whose identifiers follow
    /// and are below `depth`.
    pub(super) fn share_tags(&mut self, depth: u16) -> Result<u16, NvmeErrorKind> {
        (self.cid_end, self.next_cid) = (ADMIN_TAGS, self.next_cid % ADMIN_TAGS);
        match depth.checked_sub(ADMIN_TAGS) {
            Some(left @ 2..) => Ok(left),
            _ => Err(NvmeErrorKind::Unsuitable {
                property: "largest queue (CAP.MQES)",
                found: format!("{depth} entries"),
                wanted: "34 or more with shared tags",
            }),
        }
    }

    /// Tells a worker whether this queue has a completion.
    pub(super) fn watch(&self) -> CompletionWatch {
        self.completions.watch(Arc::clone(&self.position))
    }

    /// True if an event has been taken from the queue and not yet been handled.
    pub(super) fn has_event(&self) -> bool {
        self.event_result.is_some()
    }

    /// Takes no more events until the controller has been reset.
    pub(super) fn ignore_events(&mut self) {
        self.event_request = None;
        self.event_result = None;
    }

    /// Submits an Asynchronous Event Request, which the controller completes at the next event. NVMe 2.0 §5.2
    pub(super) fn request_event(&mut self) -> Result<(), NvmeErrorKind> {
        let entry = SubmissionEntry { opcode: admin_opcode::ASYNC_EVENT_REQUEST, ..Default::default() };
        self.event_request = Some(self.submit(AdminCommand { name: "Asynchronous Event Request", entry })?);
        Ok(())
    }

    /// Returns the next event, if there is one, after reading its log page and requesting the event after it.
    pub(super) fn next_event(
        &mut self,
        controller: &Controller,
        limit: Duration,
    ) -> Result<Option<u32>, NvmeErrorKind> {
        // No other command is in flight: any other completion is of one that timed out. A controller that writes completions
        // without end gets no more than a queue of them read.
        for _ in 0..SIZE {
            if self.event_result.is_some() || self.next_completion().is_none() {
                break;
            }
        }
        let Some(event) = self.event_result.take() else { return Ok(None) };
        let [_, _, log_page, _] = event.to_le_bytes();
        let mut command = AdminCommand::get_log_page(log_page);
        command.entry.prp1 = self.data.iova.0;
        match self.execute(controller, command, limit) {
            Ok(_) => {}
            // Not every event has a readable log page.
            Err(error @ NvmeErrorKind::CommandFailed { .. }) => {
                log::debug!("{}: {error}", controller.function().name())
            }
            Err(kind) => return Err(kind),
        }
        self.request_event()?;
        Ok(Some(event))
    }

    /// Result and status of command `cid`, if it has completed. Other completions are of commands that timed out.
    fn completion_of(&mut self, cid: u16) -> Option<(u32, Status)> {
        let entry = self.next_completion()?;
        if entry.sq_id == 0 && entry.cid == cid {
            return Some((entry.result, Status::from_word(entry.status)));
        }
        if self.event_result.is_none() {
            self.log.warn(|| format!("dropped a completion for command {:#x} of queue {}", entry.cid, entry.sq_id));
        }
        None
    }

    /// The next completion. If it completes the event request, its result is kept in `event_result`.
    fn next_completion(&mut self) -> Option<CompletionEntry> {
        let entry = self.completions.pop()?;
        self.position.store(self.completions.position(), Ordering::Release);
        self.completions.update_head();
        if !self.submissions.set_head(entry.sq_head) {
            self.log.warn(|| format!("admin submission queue head {} is out of range", entry.sq_head));
        }
        if entry.sq_id == 0 && self.event_request == Some(entry.cid) {
            self.event_request = None;
            self.event_result = Status::from_word(entry.status).is_success().then_some(entry.result);
        }
        Some(entry)
    }

    /// Executes a command that returns a page of data, such as Identify.
    pub(super) fn identify<T: FromBytes + IntoBytes>(
        &mut self,
        controller: &Controller,
        mut command: AdminCommand,
        limit: Duration,
    ) -> Result<T, NvmeErrorKind> {
        const { assert!(size_of::<T>() == PAGE_LEN) };
        // If the controller reports success without writing, the data reads as zeros, not as the previous data.
        self.data.memory.clear();
        self.data.flush(0, PAGE_LEN);
        command.entry.prp1 = self.data.iova.0;
        self.execute(controller, command, limit)?;
        self.data.flush(0, PAGE_LEN);
        Ok(self.data.memory.read(0))
    }
}
