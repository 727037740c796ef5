//! Memory whose file becomes shorter after it has been mapped. Touching a page that the file no longer has raises SIGBUS,
//! which would end this process. A front-end can do that to its own guest; it must not be able to do it to us, and to
//! whoever uses the drive next. So each such page is replaced, when it is touched, by a zero page of our own: what stood
//! there is gone in any case, and a ring of zeroes is a broken ring like any other.
//!
//! The handler looks at a fixed table of atomics and makes one system call, both of which are allowed there
//! (signal-safety(7)). A SIGBUS from anywhere else takes its usual course.

use std::fmt;
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

/// More mappings than these are not watched; a front-end has at most 509 regions.
const PLACES: usize = 1024;

/// A watched mapping; free while `start` is zero.
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
}

static TABLE: [Place; PLACES] =
    [const { Place { start: AtomicUsize::new(0), end: AtomicUsize::new(0), page: AtomicUsize::new(0) } }; PLACES];
static LOST: AtomicUsize = AtomicUsize::new(0);
static HANDLER: Once = Once::new();

/// How many pages have been replaced since the start.
#[must_use]
pub fn lost_pages() -> usize {
    LOST.load(Ordering::Relaxed)
}

/// Says in a message how many there are, if there are any.
#[derive(Clone, Copy, Debug)]
pub struct LostPages;

impl fmt::Display for LostPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match lost_pages() {
            0 => Ok(()),
            pages => write!(f, " ({pages} pages of guest memory are gone: a front-end has made its file shorter)"),
        }
    }
}

/// Watches a mapping as long as it lives; `None` if the table was full.
pub(super) struct Watch(Option<&'static Place>);

impl Watch {
    /// Watches `len` bytes from `start`, mapped in pages of `page` bytes.
    pub(super) fn new(start: usize, len: usize, page: usize) -> Self {
        HANDLER.call_once(|| {
            if let Err(error) = install() {
                log::error!("handle SIGBUS: {error}; a front-end that shortens its memory ends this process");
            }
        });
        // 1 is no address of a mapping: the place is taken, and matches nothing until it is complete.
        let take = |place: &&Place| place.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let place = TABLE.iter().find(take);
        if let Some(place) = place {
            place.end.store(start + len, Ordering::Relaxed);
            place.page.store(page, Ordering::Relaxed);
            place.start.store(start, Ordering::Release);
        }
        Self(place)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            place.start.store(0, Ordering::Release);
        }
    }
}

fn install() -> io::Result<()> {
    // SAFETY: sigaction is plain data; all of it but what is set here may be zero.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is initialised, the handler obeys signal-safety(7), and the former action is not wanted.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t, whose address field SIGBUS has.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    let inside = |place: &&Place| {
        let start = place.start.load(Ordering::Acquire);
        start > 1 && start <= address && address < place.end.load(Ordering::Relaxed)
    };
    // Not a memory error of the machine (BUS_MCEERR_*): what it hit is not known to be lost.
    if let Some(place) = TABLE.iter().find(inside).filter(|_| code == libc::BUS_ADRERR) {
        let page = place.page.load(Ordering::Relaxed);
        let (access, how) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let at = (address & !(page - 1)) as *mut libc::c_void;
        // SAFETY: the page lies in a watched mapping, whose owner keeps it mapped and reaches it by volatile copies only,
        // so bytes that change under it are nothing new.
        if unsafe { libc::mmap(at, page, access, how, -1, 0) } != libc::MAP_FAILED {
            LOST.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // SAFETY: resetting to the default action is allowed in a handler; the access is repeated and then ends the process.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
