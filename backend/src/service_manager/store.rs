//! The service manager's store of descriptors, kept equal to the session. A descriptor is stored once, under its number; the text
//! that names it is saved after it has been stored, and it is removed after a text has been saved that does not name it. What the
//! process before has stored is removed after this one has saved its session, so a crash in between loses nothing. Files that are
//! still in use keep their names: the manager ignores a file that it has already.

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
/// The names of texts begin with this; a number follows.
pub(super) const TEXT: &str = "vdv.session.";

/// A front-end can change its session again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// See the top of this file.
#[derive(Debug)]
pub struct FdStore {
    text: StateFile,
    /// The name of the text, while it is not stored yet.
    unstored: Option<String>,
    /// The text's number.
    first: u32,
    /// The texts of the process before, while they are still there.
    former: Vec<String>,
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
    /// in it at the start.
    #[must_use]
    pub fn open(terms: Terms, stored: Option<&Stored>) -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET")?;
        let limit: usize = std::env::var("FDSTORE").ok()?.parse().ok().filter(|limit| *limit > 0)?;
        match StateFile::create() {
            Ok(text) => {
                log::info!("the service manager keeps the session over a restart ({limit} descriptors)");
                // Numbers of this process begin where those of the process before end, so that no name has two meanings.
                let number = stored.map_or(0, Stored::next_number);
                let (unstored, former) =
                    (Some(format!("{TEXT}{number}")), stored.map(Stored::others).unwrap_or_default());
                let (known, next) = (stored.map(Stored::known).unwrap_or_default(), number + 1);
                Some(Self {
                    text,
                    unstored,
                    first: number,
                    former,
                    terms,
                    known,
                    next,
                    limit,
                    busy: false,
                    failed: false,
                })
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
        if let Some(name) = self.unstored.take() {
            notify::store(&name, &self.text.as_fd().try_clone_to_owned()?)?;
        }
        std::mem::take(&mut self.former).iter().try_for_each(|name| notify::remove(name))?;
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

    /// What is stored, for a process that takes the session over.
    #[must_use]
    pub fn stored(&self) -> Vec<(Option<FdKey>, u32)> {
        self.known.iter().map(|(key, number)| (Some(key.clone()), *number)).chain([(None, self.first)]).collect()
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
