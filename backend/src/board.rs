//! What the thread that serves front-ends lets others know: who is connected, and what memory it shares. Others read it without
//! asking that thread, which may be waiting for the kernel or the device.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::memory::MemTable;
use crate::socket::Peer;

/// See the top of this file.
#[derive(Default)]
pub struct Board {
    posted: Mutex<Posted>,
    listener: OnceLock<Listener>,
}

type Listener = Box<dyn Fn(Option<&FrontEnd>) + Send + Sync>;

/// What is known now.
#[derive(Clone, Debug, Default)]
pub struct Posted {
    /// Who is connected.
    pub front_end: Option<FrontEnd>,
    /// Who waits to take its place, as one text.
    pub next: Option<String>,
    /// How many front-ends have been served, including this one.
    pub front_ends: u64,
    /// The memory that a front-end shares over vhost-user.
    pub regions: Vec<SharedRegion>,
}

/// The process at the other end.
#[derive(Clone, Debug)]
pub struct FrontEnd {
    /// Program, pid and user as one text.
    pub name: String,
    /// Its pid, if it is visible from here.
    pub pid: Option<u32>,
    /// Its user.
    pub uid: u32,
    /// When it connected.
    pub since: Instant,
}

/// A region of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SharedRegion {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub bytes: u64,
    /// Inode of its file.
    pub inode: u64,
    /// Where it starts in the file, bytes.
    pub file_offset: u64,
    /// Size of a page of the file, bytes.
    pub page_bytes: u64,
}

impl Board {
    /// Calls `listener` when a front-end comes or goes, in the thread that serves it. Only the first listener is kept.
    pub fn on_front_end(&self, listener: impl Fn(Option<&FrontEnd>) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// What is known now.
    #[must_use]
    pub fn read(&self) -> Posted {
        self.lock().clone()
    }

    pub(crate) fn post_front_end(&self, peer: &Peer) {
        let (name, pid, uid) = (peer.to_string(), peer.pid(), peer.uid());
        let front_end = FrontEnd { name, pid, uid, since: Instant::now() };
        self.announce(Some(&front_end));
        let mut posted = self.lock();
        posted.front_end = Some(front_end);
        posted.front_ends += 1;
    }

    pub(crate) fn post_next(&self, next: Option<&Peer>) {
        self.lock().next = next.map(ToString::to_string);
    }

    pub(crate) fn clear_front_end(&self) {
        self.announce(None);
        let mut posted = self.lock();
        posted.front_end = None;
        posted.regions = Vec::new();
    }

    pub(crate) fn post_memory(&self, table: &MemTable) {
        let region = |region: &std::sync::Arc<crate::memory::Region>| SharedRegion {
            gpa: region.gpa().start().0,
            bytes: region.gpa().len(),
            inode: region.id().inode(),
            file_offset: region.offset(),
            page_bytes: region.page_size(),
        };
        let regions = table.regions().iter().map(region).collect();
        self.lock().regions = regions;
    }

    fn announce(&self, front_end: Option<&FrontEnd>) {
        if let Some(listener) = self.listener.get() {
            listener(front_end);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Posted> {
        self.posted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
