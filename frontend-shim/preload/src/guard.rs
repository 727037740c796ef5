//! Finds out which holes are in guest memory. QEMU punches holes into disk images as well. There, reporting success without
//! punching would leave old data in a block that must read as zero. Guest memory that a device of another process can access
//! is a memfd, or a file in tmpfs or hugetlbfs, and is mapped shared. Disk images are not mapped. So:
//!
//! | a device can access guest memory | file | hole |
//! |---|---|---|
//! | no | any | punched |
//! | yes | on any other file system | punched |
//! | yes | tmpfs, hugetlbfs; not mapped shared here | punched |
//! | yes | tmpfs, hugetlbfs; mapped shared here | not punched, success reported |
//! | yes | tmpfs, hugetlbfs; `/proc` not readable | EOPNOTSUPP: a block driver writes zeroes, a balloon ignores it |

use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use libc::c_int;
use rustix::fs::{fstat, fstatfs, major, minor};

use crate::{VM, fail};

const TMPFS_MAGIC: u32 = 0x0102_1994;
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// A file as /proc identifies it: major and minor number of its device, inode.
type FileId = (u32, u32, u64);

enum Kind {
    GuestMemory,
    Other,
    Unknown,
}

/// Calls `allocate` to punch a hole into `fd`, unless `fd` is guest memory that must not be discarded.
pub(crate) fn punch(fd: c_int, allocate: impl Fn() -> c_int) -> c_int {
    VM.unless_pinned(&allocate).unwrap_or_else(|| match kind(fd) {
        Kind::GuestMemory => 0,
        Kind::Other => allocate(),
        Kind::Unknown => fail(libc::EOPNOTSUPP),
    })
}

fn kind(fd: c_int) -> Kind {
    if fd < 0 {
        return Kind::Other;
    }
    // SAFETY: only used for two calls that fail with EBADF if the number is not a descriptor.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let (Ok(system), Ok(stat)) = (fstatfs(file), fstat(file)) else { return Kind::Other };
    if !u32::try_from(system.f_type).is_ok_and(|magic| matches!(magic, TMPFS_MAGIC | HUGETLBFS_MAGIC)) {
        return Kind::Other;
    }
    match mapped_shared((major(stat.st_dev), minor(stat.st_dev), stat.st_ino)) {
        Ok(true) => Kind::GuestMemory,
        Ok(false) => Kind::Other,
        Err(_) => Kind::Unknown,
    }
}

struct Memory {
    /// The last file found to be guest memory. A balloon punches holes page by page, so this saves reading the maps each time.
    last: Option<FileId>,
    /// /proc/self/maps, opened before QEMU enters a chroot.
    maps: Option<File>,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory { last: None, maps: None });

/// Opens /proc/self/maps while it is still reachable.
pub(crate) fn prepare() {
    let mut memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    memory.maps = File::open("/proc/self/maps").ok();
}

fn mapped_shared(file: FileId) -> std::io::Result<bool> {
    let mut memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    if memory.last == Some(file) {
        return Ok(true);
    }
    let maps = memory.maps.as_mut().ok_or(std::io::ErrorKind::NotFound)?;
    maps.rewind()?;
    for line in BufReader::new(maps).split(b'\n') {
        if shared_mapping(&String::from_utf8_lossy(&line?)) == Some(file) {
            memory.last = Some(file);
            return Ok(true);
        }
    }
    Ok(false)
}

/// The file in a line of /proc/self/maps, if it is mapped shared (proc_pid_maps(5)).
fn shared_mapping(line: &str) -> Option<FileId> {
    let mut fields = line.split_ascii_whitespace();
    let (_range, access, _offset, device, inode) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (major, minor) = device.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    access.ends_with('s').then_some((number(major)?, number(minor)?, inode.parse().ok()?))
}
