//! The file behind a region, as the front-end has passed it. It must be in memory. That is checked before any other call on
//! the file, because another file system need not answer.

use std::fmt;
use std::fs::File;

use rustix::fs::{fstat, fstatfs};
use serde::{Deserialize, Serialize};

use super::error::RegionError;
use super::page::HostPage;
use crate::addr::{Gpa, Span};
use crate::foreign_fd::{is_memory, name};

/// `f_type` of a hugetlbfs file (statfs(2)).
const HUGETLBFS_MAGIC: i64 = 0x958458f6;

/// Identity of a file. The descriptor number is no identity: QEMU sends the same memfd under several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The identity of `file`, which the front-end has shared for `gpa`.
    ///
    /// # Errors
    /// [`RegionError::NotMemory`], or the errno of `fstat`.
    pub fn of(file: &File, gpa: Span<Gpa>) -> Result<Self, RegionError> {
        Ok(Backing::of(file, gpa, HostPage::of_system())?.id)
    }

    /// The inode number, as in `/proc/PID/maps`.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }
}

/// Device and inode as in `/proc/PID/maps`: `00:01 1034`.
impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (rustix::fs::major(self.device), rustix::fs::minor(self.device));
        write!(f, "{major:02x}:{minor:02x} {}", self.inode)
    }
}

/// Properties of a file in memory.
pub(super) struct Backing {
    pub(super) id: FileId,
    /// Bytes.
    pub(super) size: u64,
    /// Bytes.
    pub(super) page_size: u64,
}

impl Backing {
    /// # Errors
    /// [`RegionError::NotMemory`], or the errno of a call on a file that is in memory.
    pub(super) fn of(file: &File, gpa: Span<Gpa>, host: HostPage) -> Result<Self, RegionError> {
        if !is_memory(file) {
            return Err(RegionError::NotMemory { gpa, found: name(file) });
        }
        Self::of_memory(file, host).map_err(|(call, errno)| RegionError::Kernel { gpa, call, source: errno.into() })
    }

    /// For a file that is known to be in memory. The error names the call.
    pub(super) fn of_memory(file: &File, host: HostPage) -> Result<Self, (&'static str, rustix::io::Errno)> {
        let stat = fstat(file).map_err(|errno| ("fstat", errno))?;
        let filesystem = fstatfs(file).map_err(|errno| ("fstatfs", errno))?;
        let hugetlb = filesystem.f_type == HUGETLBFS_MAGIC;
        Ok(Self {
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            size: stat.st_size.cast_unsigned(),
            page_size: if hugetlb { filesystem.f_bsize.cast_unsigned() } else { host.bytes() },
        })
    }
}
