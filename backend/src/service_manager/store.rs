//! The service manager's store of descriptors, kept equal to the session. A descriptor is stored once, under its number; the text
//! that names it is saved after it has been stored, and it is removed after a text has been saved that does not name it.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;

use super::notify;
use super::saved::SavedSession;
use super::state_file::StateFile;
use super::stored::Stored;
use crate::handover::{Description, FdKey, FrontEnd, Outgoing, Terms};
use crate::rate_limited_log::SharedLog;

/// Stored names begin with this.
pub(super) const PREFIX: &str = "vdv.";
/// The name of the text's file.
pub(super) const TEXT: &str = "vdv.session";

/// A front-end can change its session again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// See the top of this file.
#[derive(Debug)]
pub struct FdStore {
    text: StateFile,
    terms: Terms,
    known: HashMap<FdKey, u32>,
    next: u32,
    /// How many descriptors the manager keeps.
    limit: usize,
    /// The text is not true, because a message has been or is being served.
    busy: bool,
    failed: bool,
}

impl FdStore {
    /// The store, if the service manager offers one (`FileDescriptorStoreMax=`, which it tells by `$FDSTORE`). `stored` is what was
    /// in it at the start: its descriptors have been taken, and are not in the store any more afterwards.
    #[must_use]
    pub fn open(terms: Terms, stored: Option<&Stored>) -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET")?;
        let limit: usize = std::env::var("FDSTORE").ok()?.parse().ok().filter(|limit| *limit > 0)?;
        let opened = || -> io::Result<Self> {
            stored.map_or(Ok(()), Stored::remove)?;
            let text = StateFile::create()?;
            notify::store(TEXT, &text.as_fd().try_clone_to_owned()?)?;
            // Numbers of this process begin where those of the process before end, so that no name has two meanings.
            let next = stored.map_or(0, Stored::next_number);
            Ok(Self { text, terms, known: HashMap::new(), next, limit, busy: false, failed: false })
        };
        match opened() {
            Ok(store) => {
                log::info!("the service manager keeps the session over a restart ({limit} descriptors)");
                Some(store)
            }
            Err(error) => {
                log::warn!("the service manager's store: {error}; a restart disconnects the front-end");
                None
            }
        }
    }

    /// A message is about to be read.
    pub fn begin(&mut self) {
        if !self.busy
            && let Err(error) = self.text.set_busy()
        {
            self.fail(&error);
        }
        self.busy = true;
    }

    /// True if [`Self::save`] or [`Self::clear`] is due before this process waits for the next message.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.busy
    }

    /// Saves what `describe` returns. `live`: the rings run.
    pub fn save(
        &mut self,
        (live, write_cache): (bool, bool),
        describe: impl FnOnce(&mut Outgoing) -> io::Result<FrontEnd>,
    ) {
        let mut outgoing = Outgoing::beside(self.known.clone(), self.next);
        let saved = describe(&mut outgoing).and_then(|front_end| {
            let (version, terms) = (Description::VERSION, self.terms.clone());
            self.update(outgoing, Some(&SavedSession { version, terms, live, write_cache, front_end }))
        });
        self.settle(saved);
    }

    /// There is no session any more.
    pub fn clear(&mut self) {
        let cleared = self.update(Outgoing::beside(HashMap::new(), self.next), None);
        self.settle(cleared);
    }

    /// Waits until the service manager has everything. To be called before this process ends.
    pub fn flush(&self) {
        if let Err(error) = notify::barrier() {
            log::warn!("the service manager does not confirm what it stores: {error}");
        }
    }

    fn update(&mut self, outgoing: Outgoing, session: Option<&SavedSession>) -> io::Result<()> {
        let first = self.next;
        let count = outgoing.as_slice().len();
        if self.known.len() + count + 1 > self.limit {
            let needed = format!("{} descriptors, FileDescriptorStoreMax={}", self.known.len() + count + 1, self.limit);
            return Err(io::Error::other(needed));
        }
        for (number, fd) in (first..).zip(outgoing.as_slice()) {
            notify::store(&name(number), fd)?;
        }
        self.next = outgoing.next_number();
        let text = session.map_or(Ok(Vec::new()), serde_json::to_vec)?;
        self.text.replace(&text)?;
        let used = outgoing.into_used();
        let former = std::mem::replace(&mut self.known, used);
        for number in former.values().filter(|number| !self.known.values().any(|kept| kept == *number)) {
            notify::remove(&name(*number))?;
        }
        Ok(())
    }

    fn settle(&mut self, done: io::Result<()>) {
        match done {
            Ok(()) => (self.busy, self.failed) = (false, false),
            // It stays busy, so the next process does not believe the text.
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        self.failed = true;
        LOG.error(|| {
            format!("save the session with the service manager: {error}; a restart disconnects the front-end")
        });
    }

    /// True if what is stored is of use to the next process.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        !self.busy && !self.failed
    }
}

/// The name under which a descriptor is stored.
pub(super) fn name(number: u32) -> String {
    format!("{PREFIX}{number}")
}
