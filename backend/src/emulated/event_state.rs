//! What the controller has to report and has not reported yet (NVMe 2.0 §5.2, §5.16.1.2).

use std::collections::VecDeque;

use super::wire::Status;

/// ELPE + 1: entries of the Error Information log.
pub(super) const ERRORS_KEPT: usize = 16;
/// AERL + 1: how many Asynchronous Event Requests may wait.
pub(super) const EVENT_LIMIT: usize = 4;
/// Log page of the error events.
pub(super) const ERROR_LOG: u8 = 0x01;

/// What was wrong with a doorbell write: event type Error Status, with its information and log page (§5.2.1, Figure 146).
#[derive(Clone, Copy)]
pub(super) enum BadDoorbell {
    NoQueue = 0x01_00_00,
    BadValue = 0x01_01_00,
}

/// OAES bit 8, and the bit of Asynchronous Event Configuration: Namespace Attribute Notices (§5.27.1.8).
pub(super) const NAMESPACE_NOTICES: u32 = 1 << 8;
/// Changed Namespace List.
pub(super) const CHANGED_LOG: u8 = 0x04;
/// Event type Notice, Namespace Attribute Changed, with its log page (§5.2.1).
const NAMESPACE_CHANGED: u32 = 0x04_00_02;

/// A command that failed.
#[derive(Clone, Copy)]
pub(super) struct ErrorEntry {
    pub(super) count: u64,
    pub(super) sq: u16,
    pub(super) cid: u16,
    pub(super) status: Status,
    pub(super) lba: u64,
    pub(super) nsid: u32,
}

#[derive(Default)]
pub(super) struct Events {
    /// The newest first.
    pub(super) errors: VecDeque<ErrorEntry>,
    pub(super) error_count: u64,
    /// Identifiers of the waiting Asynchronous Event Requests.
    pub(super) waiting: Vec<u16>,
    /// Dword 0 of an event that nobody has been told.
    pub(super) pending: Option<u32>,
    pub(super) masked: bool,
    /// The namespace has changed since its log page was read; from the first notice on.
    pub(super) changed: Option<Notice>,
}

/// Where a notice stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    Pending,
    Told,
}

impl Events {
    /// Takes the waiting request `cid` away, if there is one.
    pub(super) fn withdraw(&mut self, cid: u16) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != cid);
        self.waiting.len() != before
    }

    /// The host has read the error log.
    pub(super) fn unmask(&mut self) {
        self.masked = false;
    }

    /// The host has read the list of changed namespaces; true if it had an entry.
    pub(super) fn read_changes(&mut self) -> bool {
        self.changed.take().is_some()
    }

    pub(super) fn pending(&self) -> bool {
        self.pending.is_some() || self.changed == Some(Notice::Pending)
    }

    /// Dword 0 of an event that has not been told, which it is now.
    pub(super) fn tell(&mut self) -> Option<u32> {
        if let Some(error) = self.pending.take() {
            self.masked = true;
            return Some(error);
        }
        (self.changed == Some(Notice::Pending)).then(|| {
            self.changed = Some(Notice::Told);
            NAMESPACE_CHANGED
        })
    }
}
