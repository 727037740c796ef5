//! Handles SIGBUS from guest memory whose file was truncated after it was mapped. An access to a page past the new end raises
//! SIGBUS, which by default kills the process. A front-end may break its own guest, but must not kill this process. The
//! handler therefore replaces each such page with a private zero page on first access. The old contents are lost anyway, and
//! a ring of zeroes is handled like any other broken ring.
//!
//! The handler reads a fixed table of atomics and makes one system call. Both are async-signal-safe (signal-safety(7)). A
//! SIGBUS from any other address gets the default action.

use std::fmt;
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Size of the table. Further mappings are not watched; a front-end has at most 509 regions.
const MAX_WATCHED: usize = 1024;

/// A watched mapping. The slot is free while `start` is zero.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
}

static TABLE: [Slot; MAX_WATCHED] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), page: AtomicUsize::new(0) } }; MAX_WATCHED];
static LOST: AtomicUsize = AtomicUsize::new(0);
static HANDLER: Once = Once::new();

/// Number of pages replaced since the process started.
#[must_use]
pub fn lost_pages() -> usize {
    LOST.load(Ordering::Relaxed)
}

/// A suffix for log lines: the number of lost pages, or nothing if there are none.
#[derive(Clone, Copy, Debug)]
pub struct LostPages;

impl fmt::Display for LostPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match lost_pages() {
            0 => Ok(()),
            pages => write!(f, " ({pages} pages of guest memory are gone: the front-end truncated its file)"),
        }
    }
}

/// Watches a mapping until dropped. `None` if the table was full.
pub(super) struct Watch(Option<&'static Slot>);

impl Watch {
    /// Watches `len` bytes at `start`, mapped in pages of `page` bytes.
    pub(super) fn new(start: usize, len: usize, page: usize) -> Self {
        HANDLER.call_once(|| {
            if let Err(error) = install() {
                log::error!(
                    "install the SIGBUS handler: {error}; a front-end that truncates its memory kills this process"
                );
            }
        });
        // No mapping starts at address 1: the value reserves the slot, and the handler ignores it until `start` is stored.
        let reserve = |slot: &&Slot| slot.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let slot = TABLE.iter().find(reserve);
        if let Some(slot) = slot {
            slot.end.store(start + len, Ordering::Relaxed);
            slot.page.store(page, Ordering::Relaxed);
            slot.start.store(start, Ordering::Release);
        }
        Self(slot)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.start.store(0, Ordering::Release);
        }
    }
}

fn install() -> io::Result<()> {
    // SAFETY: `sigaction` is plain data, for which all zeroes is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is initialised, the handler is async-signal-safe, and a null pointer discards the old action.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t, and SIGBUS sets its address field.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    let contains = |slot: &&Slot| {
        let start = slot.start.load(Ordering::Acquire);
        start > 1 && start <= address && address < slot.end.load(Ordering::Relaxed)
    };
    // Only BUS_ADRERR: a hardware memory error (BUS_MCEERR_*) does not mean that the file was truncated.
    if let Some(slot) = TABLE.iter().find(contains).filter(|_| code == libc::BUS_ADRERR) {
        let page = slot.page.load(Ordering::Relaxed);
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let at = (address & !(page - 1)) as *mut libc::c_void;
        // SAFETY: the page lies in a watched mapping. Its owner keeps it mapped and accesses it only by volatile copies, so
        // the contents may change at any time.
        if unsafe { libc::mmap(at, page, protection, flags, -1, 0) } != libc::MAP_FAILED {
            LOST.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // SAFETY: signal() is async-signal-safe. The access is repeated on return and then kills the process.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
