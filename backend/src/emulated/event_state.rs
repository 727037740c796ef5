//! State of asynchronous events and of the error log (NVMe 2.0 §5.2, §5.16.1.2).

use std::collections::{BTreeSet, VecDeque};

use super::wire::Status;

/// ELPE + 1: entries of the Error Information log.
pub(super) const ERRORS_KEPT: usize = 16;
/// AERL + 1: most Asynchronous Event Requests that may be outstanding.
pub(super) const EVENT_LIMIT: usize = 4;
/// Error Information log page.
pub(super) const ERROR_LOG: u8 = 0x01;

/// Dword 0 of the event for an invalid doorbell write: type Error Status, with information and log page (§5.2.1, Figure 146).
#[derive(Clone, Copy)]
pub(super) enum BadDoorbell {
    InvalidRegister = 0x01_00_00,
    InvalidValue = 0x01_01_00,
}

/// Namespace Attribute Notices: bit 8 of OAES and of Asynchronous Event Configuration (§5.27.1.8).
pub(super) const NAMESPACE_NOTICES: u32 = 1 << 8;
/// Changed Namespace List log page.
pub(super) const CHANGED_LOG: u8 = 0x04;
/// Dword 0 of the event Namespace Attribute Changed, type Notice, with log page (§5.2.1).
const NAMESPACE_CHANGED: u32 = 0x04_00_02;

/// An entry of the error log: a command that failed.
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
    /// Newest first.
    pub(super) errors: VecDeque<ErrorEntry>,
    pub(super) error_count: u64,
    /// Command identifiers of the outstanding Asynchronous Event Requests.
    pub(super) waiting: Vec<u16>,
    /// Dword 0 of an error event that has not been reported.
    pub(super) pending: Option<u32>,
    /// Error events are masked from the first report until the error log is read.
    pub(super) masked: bool,
    /// Set while the Changed Namespace List is not empty.
    pub(super) changed: Option<Notice>,
    /// What the Changed Namespace List has, in order.
    pub(super) changed_namespaces: BTreeSet<u32>,
}

/// State of a Namespace Attribute Notice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    Pending,
    Reported,
}

impl Events {
    /// Removes the outstanding request `cid`. False if there is none.
    pub(super) fn remove_request(&mut self, cid: u16) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != cid);
        self.waiting.len() != before
    }

    /// Allows error events again, after the host has read the error log.
    pub(super) fn unmask(&mut self) {
        self.masked = false;
    }

    /// Adds an entry to the Changed Namespace List.
    pub(super) fn change(&mut self, namespace: u32) {
        self.changed.get_or_insert(Notice::Pending);
        self.changed_namespaces.insert(namespace);
    }

    /// Clears the Changed Namespace List, and returns what it had.
    pub(super) fn take_changes(&mut self) -> BTreeSet<u32> {
        self.changed = None;
        std::mem::take(&mut self.changed_namespaces)
    }

    pub(super) fn pending(&self) -> bool {
        self.pending.is_some() || self.changed == Some(Notice::Pending)
    }

    /// Dword 0 of the next event to report, which is then marked as reported.
    pub(super) fn take_next(&mut self) -> Option<u32> {
        if let Some(error) = self.pending.take() {
            self.masked = true;
            return Some(error);
        }
        (self.changed == Some(Notice::Pending)).then(|| {
            self.changed = Some(Notice::Reported);
            NAMESPACE_CHANGED
        })
    }
}
