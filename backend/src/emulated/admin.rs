//! Admin commands (NVMe 2.0 §5).

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::controller::Controller;
use super::identify::{self, IDENTIFY_BYTES};
use super::lock;
use super::prp::Prps;
use super::queue::{Cq, Sq};
use super::wire::{Entry, Status, admin, high16, low16};

/// Parameters common to both Create commands.
struct NewQueue {
    id: u16,
    entries: u32,
    base: u64,
}

/// Dword 0 of the completion, or an error status.
type AdminResult = Result<u32, Status>;

impl Controller {
    /// Executes one admin command; `None` if it stays outstanding.
    pub(super) fn execute_admin(&self, entry: &Entry, sq_head: u16) -> Option<(Status, u32)> {
        let answer = match entry.opcode() {
            _ if entry.fuse() != 0 || entry.psdt() != 0 => Err(Status::INVALID_FIELD),
            admin::DELETE_IO_SQ => self.delete_sq(entry),
            admin::CREATE_IO_SQ => self.create_sq(entry),
            admin::DELETE_IO_CQ => self.delete_cq(entry),
            admin::CREATE_IO_CQ => self.create_cq(entry),
            admin::IDENTIFY => self.identify(entry),
            admin::ABORT => Ok(self.abort(entry, sq_head)),
            admin::SET_FEATURES => self.set_features(entry),
            admin::GET_FEATURES => lock(&self.admin).features.get(entry),
            admin::GET_LOG_PAGE => self.get_log_page(entry),
            admin::ASYNC_EVENT_REQUEST => match self.wait_for_event(entry) {
                Ok(()) => return None,
                Err(status) => Err(status),
            },
            _ => Err(Status::INVALID_OPCODE),
        };
        Some(answer.map_or_else(|status| (status, 0), |result| (Status::SUCCESS, result)))
    }

    /// Abort (NVMe 2.0 §5.1). Bit 0 of the result is set if the command was not aborted. Only held commands and waiting event
    /// requests can be aborted; all others have completed before the Abort is fetched.
    fn abort(&self, entry: &Entry, sq_head: u16) -> u32 {
        let (sq, cid) = (low16(entry.cdw(10)), high16(entry.cdw(10)));
        if sq == 0 {
            return u32::from(!self.abort_event(cid, sq_head));
        }
        let aborted =
            if self.sq_exists(sq) { self.abort_held(sq, Status::ABORT_REQUESTED, |held| held == cid) } else { 0 };
        u32::from(aborted == 0)
    }

    /// Identify (NVMe 2.0 §5.17).
    fn identify(&self, entry: &Entry) -> AdminResult {
        let mut page = [0; IDENTIFY_BYTES];
        let cns = entry.cdw(10).to_le_bytes()[0];
        match cns {
            0x00 => match (self.namespaces.get(entry.nsid()), entry.nsid()) {
                (Some(namespace), _) => identify::namespace(self, namespace, &mut page),
                (None, super::nvm::BROADCAST | 0) => return Err(Status::INVALID_NAMESPACE),
                (None, _) => {}
            },
            0x01 => identify::controller(self, &mut page),
            0x02 if entry.nsid() >= 0xffff_fffe => return Err(Status::INVALID_NAMESPACE),
            0x02 => identify::active_namespaces(self, entry.nsid(), &mut page),
            0x03 if self.namespaces.get(entry.nsid()).is_none() => return Err(Status::INVALID_NAMESPACE),
            0x03 => identify::descriptors(self, entry.nsid(), &mut page),
            0x06 if entry.cdw(11) >> 24 == 0 => identify::command_limits(self, &mut page), // of the NVM command set
            0x05 | 0x06 if entry.cdw(11) >> 24 == 2 => match &self.zones {
                Some(_) if cns == 5 && self.namespaces.get(entry.nsid()).is_none() => {
                    return Err(Status::INVALID_NAMESPACE);
                }
                Some(zones) if cns == 5 => identify::zoned_namespace(zones, &mut page),
                Some(zones) => identify::zoned_controller(zones, &mut page),
                None => return Err(Status::INVALID_FIELD),
            },
            _ => return Err(Status::INVALID_FIELD),
        }
        self.faults.override_identify(cns, &mut page);
        self.send(entry, &page)
    }

    /// Writes `bytes` to the buffer that the command's data pointer describes.
    pub(super) fn send(&self, entry: &Entry, bytes: &[u8]) -> AdminResult {
        let prps = Prps::new(entry, bytes.len() as u64, self.page.load(Relaxed).into());
        let dma = self.iommu.dma();
        let (mut list, mut data, mut done) = (0, 0, 0);
        prps.walk(&dma, &mut list, |span| {
            let len = usize::try_from(span.len()).expect("part of a slice");
            dma.write(span.start(), &bytes[done..done + len], &mut data)?;
            done += len;
            Ok(())
        })?;
        Ok(0)
    }

    fn set_features(&self, entry: &Entry) -> AdminResult {
        let queues_exist = (1..=self.options.queues).any(|id| self.sq_exists(id) || self.cq_exists(id));
        let features = &mut lock(&self.admin).features;
        let answer = features.set(entry, queues_exist)?;
        self.write_cache.store(features.write_cache(), SeqCst);
        Ok(answer)
    }

    /// Checks identifier, size and base of both Create commands (NVMe 2.0 §5.4, §5.5).
    fn new_queue(&self, entry: &Entry, granted: u16, exists: bool) -> Result<NewQueue, Status> {
        let id = low16(entry.cdw(10));
        if id == 0 || id > granted || exists {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let size = high16(entry.cdw(10));
        if size == 0 || size >= self.options.queue_entries || !self.entry_sizes_set.load(SeqCst) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if entry.cdw(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD); // CAP.CQR: queues are physically contiguous
        }
        if entry.prp1() & u64::from(self.page.load(Relaxed) - 1) != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        Ok(NewQueue { id, entries: u32::from(size) + 1, base: entry.prp1() })
    }

    fn create_cq(&self, entry: &Entry) -> AdminResult {
        let granted = lock(&self.admin).features.granted_cqs();
        let NewQueue { id, entries, base } = self.new_queue(entry, granted, self.cq_exists(low16(entry.cdw(10))))?;
        let vector = high16(entry.cdw(11));
        if vector >= self.usable_vectors() {
            return Err(Status::INVALID_VECTOR);
        }
        let enabled = entry.cdw(11) & 0b10 != 0;
        self.open_cq(id, Cq::new(base, entries, enabled.then_some(vector)));
        Ok(0)
    }

    fn create_sq(&self, entry: &Entry) -> AdminResult {
        let cq = high16(entry.cdw(11));
        // An identifier out of range is an Invalid Queue Identifier; one in range without a queue is a Completion Queue
        // Invalid (§5.5).
        if cq == 0 || cq > self.options.queues {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if !self.cq_exists(cq) {
            return Err(Status::COMPLETION_QUEUE_INVALID);
        }
        let granted = lock(&self.admin).features.granted_sqs();
        let NewQueue { id, entries, base } = self.new_queue(entry, granted, self.sq_exists(low16(entry.cdw(10))))?;
        self.open_sq(id, Sq::new(base, entries, cq));
        Ok(0)
    }

    /// True if I/O submission queue `id` exists. Never true for the admin queue, whose lock the caller holds.
    fn sq_exists(&self, id: u16) -> bool {
        id != 0 && self.sqs.get(usize::from(id)).is_some_and(|slot| slot.open.load(SeqCst))
    }

    /// True if I/O completion queue `id` exists.
    fn cq_exists(&self, id: u16) -> bool {
        id != 0 && self.cqs.get(usize::from(id)).is_some_and(|slot| slot.open.load(SeqCst))
    }

    fn delete_sq(&self, entry: &Entry) -> AdminResult {
        let id = low16(entry.cdw(10));
        if !self.sq_exists(id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        self.abort_held(id, Status::SQ_DELETED, |_| true);
        self.close_sq(id);
        Ok(0)
    }

    fn delete_cq(&self, entry: &Entry) -> AdminResult {
        let id = low16(entry.cdw(10));
        if !self.cq_exists(id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let in_use = |state: &super::queue::SqState| state.queue.as_ref().is_some_and(|sq| sq.cq == id);
        if self.sqs[1..].iter().any(|slot| in_use(&lock(&slot.state))) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.close_cq(id);
        Ok(0)
    }
}
