//! A file of the front-end that is no guest memory: it is mapped here alone, and not for the device.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

use super::file::Backing;
use super::page::HostPage;
use super::region::mmap_errno;
use crate::foreign_fd::{is_memory, name};
use crate::sys::SharedMemory;

/// Why a file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum SharedFileError {
    /// It is not in memory, so an access may wait for a file system.
    #[error("its file descriptor is of {found}, not of a file in memory (memfd, tmpfs, hugetlbfs)")]
    NotMemory {
        /// The name of what was found.
        found: String,
    },
    /// The offset is not a multiple of the page size.
    #[error("offset {offset:#x} is not aligned to the page size of its file, {page_size:#x}")]
    Alignment {
        /// Offset in the file, bytes.
        offset: u64,
        /// Page size of the file, bytes.
        page_size: u64,
    },
    /// The file is too short.
    #[error("it needs {len} bytes at {offset:#x} of a file of {found} bytes")]
    PastEnd {
        /// Offset in the file, bytes.
        offset: u64,
        /// Bytes wanted.
        len: u64,
        /// Size of the file, bytes.
        found: u64,
    },
    /// A system call on the file failed.
    #[error("{call}: {source}")]
    Kernel {
        /// The system call.
        call: &'static str,
        /// The errno.
        source: io::Error,
    },
}

/// Maps `len` bytes at `offset`, readable and writable. If the front-end truncates the file, the rest reads as zero.
///
/// # Errors
/// See [`SharedFileError`]. The file is checked before any call that could wait for a file system.
pub fn map_shared_file(file: File, offset: u64, len: u64) -> Result<SharedMemory, SharedFileError> {
    if !is_memory(&file) {
        return Err(SharedFileError::NotMemory { found: name(&file) });
    }
    let failed = |call, source| SharedFileError::Kernel { call, source };
    let Backing { size, page_size, .. } =
        Backing::of_memory(&file, HostPage::of_system()).map_err(|(call, errno)| failed(call, errno.into()))?;
    if !offset.is_multiple_of(page_size) {
        return Err(SharedFileError::Alignment { offset, page_size });
    }
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(SharedFileError::PastEnd { offset, len, found: size });
    }
    // The file ends in the last page, and the mapping with it.
    let [bytes, page] = [len, page_size].map(usize::try_from);
    let (Ok(bytes), Ok(page)) = (bytes, page) else {
        return Err(failed("mmap", io::ErrorKind::InvalidInput.into()));
    };
    let mapped = bytes.checked_next_multiple_of(page).ok_or(failed("mmap", io::ErrorKind::InvalidInput.into()))?;
    let source = FileOffset::from_arc(Arc::new(file), offset);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let mapping = MmapRegion::build(Some(source), mapped, protection, libc::MAP_SHARED | libc::MAP_NORESERVE)
        .map_err(|error| failed("mmap", mmap_errno(error)))?;
    let memory = SharedMemory::of_truncatable(mapping, page).map_err(|error| failed("watch it for SIGBUS", error))?;
    Ok(memory.slice(0, bytes).expect("inside the mapping"))
}
