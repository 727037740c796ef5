//! The front-end's part of a migration (vhost-user: "Migration"): it has the server mark the pages that are written, and copies
//! them. What the guest itself writes, its virtual machine knows without the server.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::Frontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{AtomicAccess, FileOffset, MmapRegion, VolatileMemory};

use super::super::ram::Ram;
use super::{Error, Guest};

/// VHOST_F_LOG_ALL
pub(super) const LOG_ALL: u64 = 1 << 26;
/// VHOST_LOG_PAGE
const PAGE: usize = 4096;

/// A log, one bit for each page from guest address 0 on.
struct Log(MmapRegion);

impl Log {
    fn new(bytes: usize) -> Result<Self, Error> {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, bytes as u64)?;
        Ok(Self(MmapRegion::from_file(FileOffset::new(file, 0), bytes)?))
    }

    /// The numbers of the marked pages, which no longer are.
    fn take(&self) -> Vec<usize> {
        let mut pages = Vec::new();
        let bytes = self.0.as_volatile_slice();
        for byte in 0..self.0.size() {
            let bits = bytes.get_atomic_ref::<<u8 as AtomicAccess>::A>(byte).expect("inside");
            let taken = if bits.load(Ordering::Relaxed) == 0 { 0 } else { bits.swap(0, Ordering::SeqCst) };
            pages.extend((0..8).filter(|bit| taken & 1 << bit != 0).map(|bit| byte * 8 + bit));
        }
        pages
    }
}

/// A copy of the guest's memory that is brought up to date by the marked pages alone.
pub struct Copy {
    log: Log,
    bytes: Vec<u8>,
    /// Pages copied since the first time.
    pub pages: u64,
}

impl Guest {
    /// Starts the log while the rings run, and copies all memory.
    ///
    /// # Errors
    /// What the server refused.
    pub fn start_copy(&mut self) -> Result<Copy, Error> {
        let log = self.new_log()?;
        self.set_logged(true)?;
        self.ram.take_written();
        let mut bytes = vec![0; self.ram.size()];
        self.ram.read(0, &mut bytes);
        Ok(Copy { log, bytes, pages: 0 })
    }

    fn new_log(&self) -> Result<Log, Error> {
        let pages = (usize::try_from(Ram::BASE)? + self.ram.size()) / PAGE;
        let log = Log::new(pages.div_ceil(64) * 8)?;
        let file = log.0.file_offset().expect("a file").file();
        let region =
            VhostUserDirtyLogRegion { mmap_size: log.0.size() as u64, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        self.frontend()?.set_log_base(0, Some(region))?;
        Ok(log)
    }

    /// Gives the server another log, as when memory is added. What is marked in the former one counts.
    ///
    /// # Errors
    /// What the server refused.
    pub fn replace_log(&mut self, copy: &mut Copy) -> Result<(), Error> {
        let former = std::mem::replace(&mut copy.log, self.new_log()?);
        self.copy_pages(copy, former.take());
        Ok(())
    }

    /// Ends the log while the rings run.
    ///
    /// # Errors
    /// What the server refused.
    pub fn end_copy(&mut self) -> Result<(), Error> {
        self.set_logged(false)
    }

    /// Goes on with another server and another log, because the one before has died. QEMU sends the log last.
    ///
    /// # Errors
    /// What the server refused.
    pub fn connect_logged(&mut self, socket: UnixStream, copy: &mut Copy) -> Result<(), Error> {
        self.connect(socket)?;
        self.replace_log(copy)
    }

    fn set_logged(&mut self, logged: bool) -> Result<(), Error> {
        self.logged = logged;
        let frontend = self.frontend()?;
        frontend.set_features(self.features | if logged { LOG_ALL } else { 0 })?;
        self.rings.iter().enumerate().try_for_each(|(index, ring)| ring.address(frontend, index, logged))
    }

    fn frontend(&self) -> Result<&Frontend, Error> {
        Ok(self.link.as_ref().map(|(frontend, _)| frontend).ok_or("not connected")?)
    }

    /// Copies the pages that the guest or the server has written since the last round.
    pub fn round(&self, copy: &mut Copy) {
        let first = usize::try_from(Ram::BASE).expect("small") / PAGE;
        let written = self.ram.take_written().into_iter().map(|page| page + first);
        let pages = copy.log.take().into_iter().chain(written).collect();
        self.copy_pages(copy, pages);
    }

    fn copy_pages(&self, copy: &mut Copy, pages: Vec<usize>) {
        copy.pages += pages.len() as u64;
        for page in pages {
            let at = page * PAGE - usize::try_from(Ram::BASE).expect("small");
            let end = (at + PAGE).min(copy.bytes.len());
            self.ram.read(at, &mut copy.bytes[at..end]);
        }
    }

    /// The first page whose content in `copy` differs from that in memory: its offset there.
    #[must_use]
    pub fn first_difference(&self, copy: &Copy) -> Option<usize> {
        let mut page = [0; PAGE];
        (0..copy.bytes.len()).step_by(PAGE).find(|at| {
            let copied = &copy.bytes[*at..(at + PAGE).min(copy.bytes.len())];
            let page = &mut page[..copied.len()];
            self.ram.read(*at, page);
            page != copied
        })
    }
}
