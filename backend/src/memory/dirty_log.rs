//! The log of dirty pages: a bitmap in a file that the front-end reads and clears, to copy the pages of guest memory that have
//! been written since (vhost-user: "Migration"). Bit n % 8 of byte n / 8 stands for page n.
//!
//! A mark follows the writes that it is for. If it came before, the front-end could take it, copy the page, and miss the write.
//!
//! A front-end that truncates the file takes marks away. [`DirtyLog::fault`] tells so from then on, and nothing that depends on
//! a mark may be published.

use std::fmt;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

use super::shared_file::{SharedFileError, map_shared_file};
use crate::addr::{Address, Gpa, Span};
use crate::sys::{LossCounter, SharedMemory};

/// `VHOST_LOG_PAGE`: bytes that one bit stands for, whatever the page size of guest memory.
pub const LOG_PAGE: u64 = 0x1000;

/// See the top of this file.
pub struct DirtyLog {
    bits: SharedMemory,
    losses: LossCounter,
    /// A mark was outside: a bug, because the log is checked against what can be marked.
    outside: AtomicBool,
    source: (File, u64),
}

/// Why the marks of a log are not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogFault {
    /// The file was truncated.
    #[error("{0} pages of the dirty log are gone: the front-end truncated its file")]
    Lost(usize),
    /// The log has no bit for a page that was written.
    #[error("a page beyond the end of the dirty log was written")]
    Outside,
}

impl DirtyLog {
    /// Maps the log of `bytes` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// See [`SharedFileError`].
    pub fn map(file: File, offset: u64, bytes: u64) -> Result<Self, SharedFileError> {
        let failed = |call, source| SharedFileError::Kernel { call, source };
        let kept = file.try_clone().map_err(|error| failed("duplicate the file of the dirty log", error))?;
        let bits = map_shared_file(file, offset, bytes)?;
        let losses = bits.loss_counter().expect("a shared file is watched");
        Ok(Self { bits, losses, outside: AtomicBool::new(false), source: (kept, offset) })
    }

    /// The file, the offset in it and the size, bytes.
    #[must_use]
    pub fn source(&self) -> (&File, u64, u64) {
        (&self.source.0, self.source.1, self.bits.len() as u64)
    }

    /// True if there is a bit for the page of `address`.
    #[must_use]
    pub fn covers(&self, address: Gpa) -> bool {
        address.raw() / LOG_PAGE / 8 < self.bits.len() as u64
    }

    /// Marks the pages of `span`, which have been written.
    pub fn mark(&self, span: Span<Gpa>) {
        if !self.covers(span.last()) {
            return self.outside.store(true, Ordering::SeqCst);
        }
        let (first, last) = (span.start().raw() / LOG_PAGE, span.last().raw() / LOG_PAGE);
        for byte in first / 8..=last / 8 {
            let from = if byte == first / 8 { first % 8 } else { 0 };
            let to = if byte == last / 8 { last % 8 } else { 7 };
            let mask = (u8::MAX >> (7 - to)) & (u8::MAX << from);
            self.bits.fetch_or_u8(usize::try_from(byte).expect("covered"), mask);
        }
    }

    /// Why marks made until now may be missing. Once there is a reason, it stays.
    ///
    /// # Errors
    /// [`LogFault`]
    #[inline]
    pub fn fault(&self) -> Result<(), LogFault> {
        match self.losses.lost_pages() {
            _ if self.outside.load(Ordering::SeqCst) => Err(LogFault::Outside),
            0 => Ok(()),
            pages => Err(LogFault::Lost(pages)),
        }
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyLog({} bytes)", self.bits.len())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn log(bytes: u64) -> (DirtyLog, File) {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, bytes).unwrap();
        (DirtyLog::map(file.try_clone().unwrap(), 0, bytes).unwrap(), file)
    }

    fn span(start: u64, len: u64) -> Span<Gpa> {
        Span::new(Gpa(start), len).unwrap()
    }

    #[test]
    fn each_page_that_a_span_touches_has_its_bit() {
        for (start, len, expected) in [
            (0, 1, [1, 0, 0]),
            (0xfff, 1, [1, 0, 0]),
            (0xfff, 2, [3, 0, 0]),
            (0x7000, 0x1000, [0x80, 0, 0]),
            (0x7fff, 2, [0x80, 1, 0]),
            (0x3123, 0x2000, [0x38, 0, 0]),
            (0x6000, 0xb000, [0xc0, 0xff, 1]),
            (0x17fff, 1, [0, 0, 0x80]),
        ] {
            let (log, file) = log(3);

            log.mark(span(start, len));

            let mut found = [0; 3];
            file.read_exact_at(&mut found, 0).unwrap();
            assert_eq!(found, expected, "{start:#x} {len:#x}");
            assert_eq!(log.fault(), Ok(()));
        }
    }

    #[test]
    fn bits_that_are_set_stay_set() {
        let (log, file) = log(1);
        file.write_all_at(&[0x42], 0).unwrap();

        log.mark(span(0, 1));

        let mut found = [0];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, [0x43]);
    }

    #[test]
    fn a_page_without_a_bit_is_a_fault() {
        let (log, _file) = log(2);
        assert!(log.covers(Gpa(0xffff)) && !log.covers(Gpa(0x1_0000)));

        log.mark(span(0xf000, 0x1001));

        assert_eq!(log.fault(), Err(LogFault::Outside));
    }

    #[test]
    fn a_mark_in_a_truncated_file_is_a_fault() {
        let (log, file) = log(0x2000);
        log.mark(span(0, 1));
        assert_eq!(log.fault(), Ok(()));
        ftruncate(&file, 0x1000).unwrap();

        log.mark(span(0x1000 * 8 * LOG_PAGE, 1));

        assert_eq!(log.fault(), Err(LogFault::Lost(1)));
    }
}
