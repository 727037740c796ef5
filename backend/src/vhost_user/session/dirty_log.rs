//! The messages about the log of dirty pages.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserLog;

use super::Session;
use super::descriptor::{event_fd, set_cloexec};
use crate::addr::Gpa;
use crate::memory::{DirtyLog, MemTable};
use crate::vhost_user::Error;
use crate::vhost_user::dirty_log::{LogError, LogSetup, check_room};
use crate::vhost_user::features::{ProtocolFeatures, VirtioFeatures};
use crate::vhost_user::vring::{Addresses, Vring};

impl Session<'_> {
    /// True if pages must be marked.
    pub(super) fn logs_pages(&self) -> bool {
        self.features.is_some_and(|features| features.contains(VirtioFeatures::LOG_ALL))
    }

    /// SET_LOG_BASE: the log from now on. Returns when no page is marked in the former one any more.
    pub(super) fn set_log(&mut self, message: &VhostUserLog, file: File) -> Result<(), Error> {
        self.adopt_log(message, file)?;
        self.start_rings();
        Ok(())
    }

    /// As [`Self::set_log`], and starts no ring.
    pub(super) fn adopt_log(&mut self, message: &VhostUserLog, file: File) -> Result<(), Error> {
        let log = DirtyLog::map(set_cloexec(file)?, message.mmap_offset, message.mmap_size).map_err(LogError::from)?;
        self.check_log(&log, self.memory.table())?;
        self.log.log = Some(Arc::new(log));
        self.apply_log();
        Ok(())
    }

    /// SET_LOG_FD: who is told of marks.
    pub(in super::super) fn set_log_event(&mut self, fd: OwnedFd) -> Result<(), Error> {
        self.log.event = event_fd("SET_LOG_FD", Some(fd.into()))?.map(Arc::new);
        self.apply_log();
        Ok(())
    }

    /// SET_VRING_ADDR, with what the used ring is logged as.
    pub(super) fn set_ring_addresses(
        &mut self,
        index: u32,
        addresses: Addresses,
        used_log: Option<Gpa>,
    ) -> Result<(), Error> {
        let (engine, layout) = (&self.device.engine, self.layout());
        let log = self.log.log.clone().filter(|_| self.logs_pages());
        self.set_up_ring(index, |ring| {
            ring.set_addresses(addresses)?;
            ring.set_used_log(engine, used_log, (log.as_deref(), layout))
        })
    }

    /// Checks LOG_ALL in `features` before it is accepted.
    pub(super) fn check_log_all(&self, features: VirtioFeatures) -> Result<(), Error> {
        if !features.contains(VirtioFeatures::LOG_ALL) {
            return Ok(());
        }
        if !self.protocol.contains(ProtocolFeatures::LOG_SHMFD) {
            return Err(LogError::NoFile.into());
        }
        match &self.log.log {
            Some(log) => self.check_log(log, self.memory.table()),
            None if self.rings.iter().any(Vring::is_running) => Err(LogError::NoLog.into()),
            None => Ok(()),
        }
    }

    /// Checks that `log` has room for the memory in `table` and for each used ring.
    fn check_log(&self, log: &DirtyLog, table: &MemTable) -> Result<(), Error> {
        if let Some(region) = table.regions().last() {
            check_room(log, || format!("memory region {}", region.gpa()), region.gpa().last())?;
        }
        self.rings.iter().try_for_each(|ring| ring.check_log(log, self.layout()))
    }

    /// Checks that the log, if it is in use, has room for memory that ends at `last`.
    pub(super) fn check_log_room(&self, last: Option<Gpa>) -> Result<(), Error> {
        let Some((log, last)) = self.log.log.as_ref().filter(|_| self.logs_pages()).zip(last) else { return Ok(()) };
        Ok(check_room(log, || "the new memory".into(), last)?)
    }

    /// Tells the engine where to mark pages, or to stop that.
    pub(super) fn apply_log(&mut self) {
        if !self.is_served {
            return;
        }
        let logging = self.log.logging().filter(|_| self.logs_pages());
        if logging.is_some() != std::mem::replace(&mut self.is_logging, logging.is_some()) {
            let does = if self.is_logging { "are logged" } else { "are no longer logged" };
            self.logs.connections.info(|| format!("{}: dirty pages {does}", self.peer));
        } else if logging.is_none() {
            return;
        }
        self.device.engine.set_logging(logging.as_ref());
    }

    /// Says so if this ring waits for a log, because its guest waits as well.
    pub(super) fn tell_of_missing_log(&self, index: usize) {
        if self.logs_pages() && self.log.log.is_none() && self.rings[index].is_set_up() {
            self.logs.connections.info(|| format!("virtqueue {index} waits for SET_LOG_BASE"));
        }
    }

    /// A ring has been stopped. If no other is set up, the log belongs to the past: QEMU sends another at the next start, and has
    /// freed this one.
    pub(super) fn drop_unused_log(&mut self) {
        if !self.rings.iter().any(Vring::is_set_up) {
            self.log = LogSetup { log: None, event: self.log.event.take() };
            self.apply_log();
        }
    }
}
