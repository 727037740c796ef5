//! Marks pages of guest memory that are written, so that the front-end copies them again (vhost-user: "Migration").
//!
//! | what | written by | marked |
//! |---|---|---|
//! | data of a read, the identity string | the device, or a copy from a bounce slot | when the request completes, whatever its outcome |
//! | status byte | the worker | then |
//! | used entries, used descriptors | the worker | before they are published, and again after that |
//! | suppression of kicks | the worker | after the write |
//!
//! Discards, zeroes, writes and flushes write nothing but their status. A request is marked when it completes, so those that were
//! in flight when the log came are marked, too.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::guest_memory::GuestMemoryView;
use crate::addr::{Gpa, Iova, Span};
use crate::eventfd::{make_nonblocking, signal};
use crate::memory::{DirtyLog, LogFault};

/// The log, and who is told of marks.
#[derive(Clone, Debug)]
pub struct DirtyLogging {
    log: Arc<DirtyLog>,
    /// SET_LOG_FD.
    event: Option<Arc<OwnedFd>>,
}

impl DirtyLogging {
    /// `event` is signalled after marks.
    #[must_use]
    pub fn new(log: Arc<DirtyLog>, event: Option<Arc<OwnedFd>>) -> Self {
        event.iter().for_each(make_nonblocking);
        Self { log, event }
    }

    /// Marks what a request has written: its status byte, and the first `bytes` of `buffers`.
    #[cold]
    #[inline(never)]
    pub(super) fn mark_request(
        &self,
        guest: &GuestMemoryView,
        status: Option<Gpa>,
        (buffers, bytes): (&[Span<Iova>], u64),
    ) {
        first_bytes(buffers, bytes).for_each(|span| self.log.mark(guest.gpa(span)));
        if let Some(byte) = status.and_then(|address| Span::new(address, 1)) {
            self.log.mark(byte);
        }
    }

    /// Why marks may be missing.
    pub(super) fn fault(&self) -> Result<(), LogFault> {
        self.log.fault()
    }

    /// Tells the front-end that there are new marks.
    pub(super) fn signal(&self) {
        if let Some(event) = &self.event {
            signal(&**event);
        }
    }

    /// The log of a ring whose used part is logged at `used` and whose descriptors are at `desc`.
    pub(super) fn of_ring(&self, used: Gpa, desc: Gpa) -> RingLog {
        RingLog { log: Arc::clone(&self.log), used, desc }
    }
}

fn first_bytes(buffers: &[Span<Iova>], bytes: u64) -> impl Iterator<Item = Span<Iova>> {
    let part = |left: &mut u64, buffer: &Span<Iova>| {
        let len = buffer.len().min(*left);
        *left -= len;
        Some(buffer.slice(0, len))
    };
    buffers.iter().scan(bytes, part).flatten()
}

/// Where writes to a ring are marked.
#[derive(Clone, Debug)]
pub struct RingLog {
    log: Arc<DirtyLog>,
    /// `log_guest_addr`: what is logged as the first byte of the used ring, or of the device's event suppression structure
    /// (vhost-user: "Vring address description").
    used: Gpa,
    /// The descriptors of a packed ring are logged where they are: the protocol has no other address for them.
    desc: Gpa,
}

impl RingLog {
    /// Marks bytes of the used ring, or of the device's event suppression structure.
    pub(super) fn mark_used(&self, offset: usize, len: usize) {
        self.mark(self.used, offset, len);
    }

    /// Marks bytes of a packed ring's descriptors.
    pub(super) fn mark_descriptors(&self, offset: usize, len: usize) {
        self.mark(self.desc, offset, len);
    }

    fn mark(&self, base: Gpa, offset: usize, len: usize) {
        let start = base.0.checked_add(offset as u64);
        if let Some(span) = start.and_then(|start| Span::new(Gpa(start), len as u64)) {
            self.log.mark(span);
        }
    }
}
