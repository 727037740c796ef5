//! Handles SIGBUS from guest memory whose file was truncated after it was mapped. An access to a page past the new end raises
//! SIGBUS, which by default kills the process. A front-end may break its own guest, but must not kill this process. The
//! handler therefore replaces each such page with a private zero page on first access. The old contents are lost anyway, and
//! a ring of zeroes is handled like any other broken ring.
//!
//! Each page that is replaced alone can split a mapping into three, of which the kernel allows a process 65530
//! (`vm.max_map_count`). So after [`MAX_ALONE`] pages the whole mapping is replaced.
//!
//! The handler reads a fixed table of atomics and makes one system call. Both are async-signal-safe (signal-safety(7)). A
//! SIGBUS from any other address gets the default action.

use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Size of the table, in mappings. More cannot be made. A whole function has at most 4096 maps, a disk 509 regions; tests
/// have several of both in one process.
pub const MAX_WATCHED: usize = 16384;

/// Pages that are replaced one by one, in all watched mappings together.
const MAX_ALONE: usize = 8192;

/// A watched mapping. The slot is free while `start` is zero.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    /// Pages replaced.
    lost: AtomicUsize,
}

impl Slot {
    const fn free() -> Self {
        let [start, end, page, lost] = [const { AtomicUsize::new(0) }; 4];
        Self { start, end, page, lost }
    }

    /// True if the mapping contains `address`.
    fn contains(&self, address: usize) -> bool {
        self.range(|| ()).is_some_and(|(start, end)| start <= address && address < end)
    }

    /// Start and end of the mapping. While the slot passes from one mapping to the next it has none: an old start and a new end
    /// would make a range of neither. Whoever sees a new end sees the start that came before it, too, and that differs. `between`
    /// runs where another thread could change the slot.
    fn range(&self, between: impl FnOnce()) -> Option<(usize, usize)> {
        let start = self.start.load(Ordering::Acquire);
        between();
        let end = self.end.load(Ordering::Acquire);
        (start > 1 && self.start.load(Ordering::Relaxed) == start).then_some((start, end))
    }

    /// Occupies a reserved slot.
    fn occupy(&self, start: usize, end: usize, page: usize) {
        self.end.store(end, Ordering::Release);
        self.page.store(page, Ordering::Relaxed);
        self.lost.store(0, Ordering::Relaxed);
        self.start.store(start, Ordering::Release);
    }
}

static TABLE: [Slot; MAX_WATCHED] = [const { Slot::free() }; MAX_WATCHED];
static LOST: AtomicUsize = AtomicUsize::new(0);
/// Pages replaced in the mappings that are watched now.
static ALONE: AtomicUsize = AtomicUsize::new(0);
/// The errno of installing the handler; 0 if it is installed.
static HANDLER: OnceLock<i32> = OnceLock::new();

/// Number of pages replaced since the process started.
#[must_use]
fn lost_pages() -> usize {
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

/// Number of pages replaced in the watched mapping that contains `address`; 0 if there is none.
pub(super) fn lost_pages_at(address: usize) -> usize {
    TABLE.iter().find(|slot| slot.contains(address)).map_or(0, |slot| slot.lost.load(Ordering::Relaxed))
}

/// Counts the pages replaced in one mapping. The slot belongs to the mapping for as long as that is watched.
#[derive(Clone, Copy)]
pub struct LossCounter(&'static Slot);

impl LossCounter {
    /// The counter of the watched mapping that contains `address`.
    pub(super) fn at(address: usize) -> Option<Self> {
        TABLE.iter().find(|slot| slot.contains(address)).map(Self)
    }

    /// Pages replaced so far. What this thread has stored into the mapping before is in its file if this is zero.
    #[inline]
    #[must_use]
    pub fn lost_pages(self) -> usize {
        self.0.lost.load(Ordering::SeqCst)
    }
}

/// Watches a mapping until dropped.
pub(super) struct Watch(&'static Slot);

impl Watch {
    /// Watches `len` bytes at `start`, mapped in pages of `page` bytes.
    ///
    /// # Errors
    /// ENOSPC if the table is full, or the errno of installing the handler: the mapping must not be used then, because whoever
    /// shortens its file would end this process.
    pub(super) fn new(start: usize, len: usize, page: usize) -> io::Result<Self> {
        let errno =
            *HANDLER.get_or_init(|| install().map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0));
        if errno != 0 {
            return Err(io::Error::from_raw_os_error(errno));
        }
        // No mapping starts at address 1: the value reserves the slot, and the handler ignores it until `start` is stored.
        let reserve = |slot: &&Slot| {
            let free = slot.start.load(Ordering::Relaxed) == 0;
            free && slot.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = TABLE.iter().find(reserve).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        slot.occupy(start, start + len, page);
        Ok(Self(slot))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        ALONE.fetch_sub(self.0.lost.load(Ordering::Relaxed), Ordering::Relaxed);
        self.0.start.store(0, Ordering::Release);
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
    // Only BUS_ADRERR: a hardware memory error (BUS_MCEERR_*) does not mean that the file was truncated.
    if let Some(slot) = TABLE.iter().find(|slot| slot.contains(address)).filter(|_| code == libc::BUS_ADRERR) {
        let page = slot.page.load(Ordering::Relaxed);
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let (start, end) = (slot.start.load(Ordering::Relaxed), slot.end.load(Ordering::Relaxed));
        let alone = ALONE.load(Ordering::Relaxed) < MAX_ALONE;
        let (at, len) = if alone { (address & !(page - 1), page) } else { (start, end - start) };
        // Counted first: a thread that stores into the new page then finds it counted.
        slot.lost.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the pages are a watched mapping, or lie in one. Its owner keeps it mapped and accesses it only by volatile
        // copies, so the contents may change at any time.
        if unsafe { libc::mmap(at as *mut libc::c_void, len, protection, flags, -1, 0) } != libc::MAP_FAILED {
            LOST.fetch_add(1, Ordering::Relaxed);
            ALONE.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // SAFETY: signal() is async-signal-safe. The access is repeated on return and then kills the process.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_passes_from_one_mapping_to_another_contains_nothing_between_them() {
        let slot = Slot::free();
        slot.occupy(0x1000, 0x2000, 0x1000);

        let torn = slot.range(|| {
            slot.start.store(0, Ordering::Release);
            slot.occupy(0x8000, 0x9000, 0x1000);
        });

        assert_eq!((torn, slot.range(|| ())), (None, Some((0x8000, 0x9000))), "not from the old start to the new end");
    }
}
