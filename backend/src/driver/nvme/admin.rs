//! The admin queue: one command at a time, its completion polled for.
//!
//! Admin commands are issued while the controller is brought up and down, and rarely in between, so there is nothing to gain
//! from more than one in flight, and no second thread to wake.

use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::controller::{AdminRings, Controller, poll};
use super::error::Cause;
use super::regs::PAGE_LEN;
use super::rings::{CompletionRing, Shared, SubmissionRing, completion_bytes, submission_bytes};
use super::spec::{CompletionEntry, NAMESPACE_NOTICES, SubmissionEntry, admin_opcode, feature};
use super::status::Status;
use crate::driver::CommandId;

/// Entries of each admin ring. Few commands are ever outstanding, and those only because they timed out.
const SIZE: u16 = 32;

/// An admin command, by what the specification calls it.
pub(super) struct AdminCommand {
    pub(super) name: &'static str,
    pub(super) entry: SubmissionEntry,
}

impl AdminCommand {
    /// NVMe 2.0 §5.17; the data goes to the admin queue's own page.
    pub(super) fn identify(name: &'static str, cns: u32, nsid: u32) -> Self {
        Self { name, entry: SubmissionEntry { opcode: admin_opcode::IDENTIFY, nsid, cdw10: cns, ..Default::default() } }
    }

    /// NVMe 2.0 §5.27.1.5: asks for `count` pairs of I/O queues (0's based on the wire).
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

    /// NVMe 2.0 §5.27.1.4: is the write cache on? Bit 0 of the result.
    pub(super) fn get_volatile_write_cache() -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::GET_FEATURES,
            cdw10: feature::VOLATILE_WRITE_CACHE,
            ..Default::default()
        };
        Self { name: "Get Features (Volatile Write Cache)", entry }
    }

    /// NVMe 2.0 §5.1: bit 0 of the result says that nothing was aborted.
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

    /// NVMe 2.0 §5.27.1.8: namespace attribute notices, and nothing about health.
    pub(super) fn set_async_events() -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::SET_FEATURES,
            cdw10: feature::ASYNC_EVENTS,
            cdw11: NAMESPACE_NOTICES,
            ..Default::default()
        };
        Self { name: "Set Features (Asynchronous Event Configuration)", entry }
    }

    /// NVMe 2.0 §5.16: a whole page, which the data goes to as that of Identify does. Reading it lets events about it come
    /// again.
    fn get_log_page(id: u8) -> Self {
        let dwords = u32::try_from(PAGE_LEN / 4 - 1).expect("a page");
        let cdw10 = dwords << 16 | u32::from(id);
        let entry = SubmissionEntry { opcode: admin_opcode::GET_LOG_PAGE, nsid: u32::MAX, cdw10, ..Default::default() };
        Self { name: "Get Log Page", entry }
    }

    /// NVMe 2.0 §5.4: physically contiguous, with interrupts on `vector`.
    pub(super) fn create_completion_queue(id: u16, depth: u16, memory: u64, vector: u16) -> Self {
        let entry = SubmissionEntry {
            opcode: admin_opcode::CREATE_IO_CQ,
            prp1: memory,
            cdw10: u32::from(depth - 1) << 16 | u32::from(id),
            cdw11: u32::from(vector) << 16 | 0b11,
            ..Default::default()
        };
        Self { name: "Create I/O Completion Queue", entry }
    }

    /// NVMe 2.0 §5.5: physically contiguous, completing to the completion queue of the same identifier.
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

/// The admin queue pair and one page for data.
pub(super) struct AdminQueue {
    submissions: SubmissionRing,
    completions: CompletionRing,
    data: Shared,
    next_cid: u16,
    /// The Asynchronous Event Request that waits.
    listening: Option<u16>,
    /// Dword 0 of its completion.
    heard: Option<u32>,
}

impl AdminQueue {
    /// Takes memory from the controller, which is disabled; returns what [`Controller::enable`] must be told as well.
    pub(super) fn new(controller: &mut Controller) -> Result<(Self, AdminRings), Cause> {
        let size = SIZE.min(u16::try_from(controller.capabilities().max_queue_entries()).unwrap_or(SIZE));
        let (sq_bytes, cq_bytes) = (submission_bytes(size), completion_bytes(size));
        let memory = controller.memory("the admin queue", sq_bytes + cq_bytes + PAGE_LEN)?;
        let submissions = memory.part(0, sq_bytes);
        let completions = memory.part(sq_bytes, cq_bytes);
        let rings = AdminRings { submissions: submissions.iova, completions: completions.iova, size };
        let doorbells = controller.doorbells();
        let queue = Self {
            submissions: SubmissionRing::new(&submissions, 0, size, &doorbells),
            completions: CompletionRing::new(&completions, 0, size, &doorbells),
            data: memory.part(sq_bytes + cq_bytes, PAGE_LEN),
            next_cid: 0,
            listening: None,
            heard: None,
        };
        Ok((queue, rings))
    }

    /// Runs `command` to its end and returns dword 0 of its completion.
    pub(super) fn execute(
        &mut self,
        controller: &Controller,
        command: AdminCommand,
        limit: Duration,
    ) -> Result<u32, Cause> {
        let name = command.name;
        let cid = self.submit(command)?;
        let answer = poll(limit, || {
            let answer = self.take_answer(cid);
            if answer.is_none() {
                let status = controller.status()?;
                if status.fatal() {
                    return Err(Cause::fatal(status));
                }
            }
            Ok(answer)
        })?;
        let (result, status) = answer.ok_or(Cause::NoAnswer { command: name, limit })?;
        if status.is_success() { Ok(result) } else { Err(Cause::Command { command: name, status }) }
    }

    /// Sends `command`; its identifier comes back.
    fn submit(&mut self, AdminCommand { name, mut entry }: AdminCommand) -> Result<u16, Cause> {
        if self.submissions.is_full() {
            return Err(Cause::NoAnswer { command: name, limit: Duration::ZERO });
        }
        entry.cid = self.next_cid;
        // FFFFh means "no command" (NVMe 2.0 §3.3.3.1).
        let next = |cid: u16| (cid + 1) % u16::MAX;
        self.next_cid = next(entry.cid);
        if self.listening == Some(self.next_cid) {
            self.next_cid = next(self.next_cid);
        }
        self.submissions.push(&entry);
        self.submissions.ring();
        Ok(entry.cid)
    }

    /// Lets the controller tell what happens: the next event completes the request that is left there.
    pub(super) fn listen(&mut self) -> Result<(), Cause> {
        let entry = SubmissionEntry { opcode: admin_opcode::ASYNC_EVENT_REQUEST, ..Default::default() };
        self.listening = Some(self.submit(AdminCommand { name: "Asynchronous Event Request", entry })?);
        Ok(())
    }

    /// What has happened, if anything has. The page that tells about it has been read, and the next event can come.
    pub(super) fn event(&mut self, controller: &Controller, limit: Duration) -> Result<Option<u32>, Cause> {
        // Nothing else is in flight, so whatever is there is the event.
        while self.heard.is_none() && self.take().is_some() {}
        let Some(event) = self.heard.take() else { return Ok(None) };
        let [_, _, page, _] = event.to_le_bytes();
        let mut command = AdminCommand::get_log_page(page);
        command.entry.prp1 = self.data.iova.0;
        match self.execute(controller, command, limit) {
            Ok(_) => {}
            // Not every event has a page that may be read.
            Err(error @ Cause::Command { .. }) => log::debug!("{}: {error}", controller.function().name()),
            Err(cause) => return Err(cause),
        }
        self.listen()?;
        Ok(Some(event))
    }

    /// The completion of `cid`, if it is there; others belong to commands that were given up.
    fn take_answer(&mut self, cid: u16) -> Option<(u32, Status)> {
        let entry = self.take()?;
        if entry.sq_id == 0 && entry.cid == cid {
            return Some((entry.result, Status::from_word(entry.status)));
        }
        if self.heard.is_none() {
            log::warn!("dropped a completion for command {:#x} of queue {}", entry.cid, entry.sq_id);
        }
        None
    }

    /// The next completion. That of [`Self::listen`] is taken note of.
    fn take(&mut self) -> Option<CompletionEntry> {
        let entry = self.completions.take()?;
        self.completions.release();
        if !self.submissions.consumed_to(entry.sq_head) {
            log::warn!("admin submission queue head {} is out of range", entry.sq_head);
        }
        if entry.sq_id == 0 && self.listening == Some(entry.cid) {
            self.listening = None;
            self.heard = Status::from_word(entry.status).is_success().then_some(entry.result);
        }
        Some(entry)
    }

    /// Runs an Identify command and returns its data.
    pub(super) fn identify<T: FromBytes + IntoBytes>(
        &mut self,
        controller: &Controller,
        mut command: AdminCommand,
        limit: Duration,
    ) -> Result<T, Cause> {
        const { assert!(size_of::<T>() == PAGE_LEN) };
        // A controller that claims success without writing is seen as all zeros, not as the previous answer.
        self.data.shared.clear();
        self.data.flush(0, PAGE_LEN);
        command.entry.prp1 = self.data.iova.0;
        self.execute(controller, command, limit)?;
        self.data.flush(0, PAGE_LEN);
        Ok(self.data.shared.read(0))
    }
}
