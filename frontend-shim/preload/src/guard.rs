//! Which holes are holes in guest memory? QEMU punches them into disk images as well, where a hole that is not punched but
//! reported would be a block that was to be zero and is not. Guest memory that a device of another process can reach is a
//! memfd, a file in tmpfs or in hugetlbfs, mapped shared; disk images are not mapped. So:
//!
//! | a device reaches guest memory | file | hole |
//! |---|---|---|
//! | no | any | punched |
//! | yes | on any other file system | punched |
//! | yes | tmpfs, hugetlbfs; not mapped shared here | punched |
//! | yes | tmpfs, hugetlbfs; mapped shared here | success, and nothing happens |
//! | yes | tmpfs, hugetlbfs; `/proc` does not say | EOPNOTSUPP: a block driver writes zeroes instead, a balloon goes on |

use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use libc::c_int;
use rustix::fs::{fstat, fstatfs, major, minor};

use crate::{VM, fail};

const TMPFS_MAGIC: u32 = 0x0102_1994;
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// A file, as /proc names it: major and minor number of its device, inode.
type FileId = (u32, u32, u64);

enum Kind {
    GuestMemory,
    Other,
    Unknown,
}

/// Punches the hole into `fd` that `allocate` stands for, unless it is one in guest memory that must stay.
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
    // SAFETY: used for two calls that answer EBADF for a number that is no descriptor.
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

/// The file in which the last hole would have been, since a balloon asks page by page; and /proc/self/maps, opened before
/// QEMU goes into a chroot.
struct Memory {
    last: Option<FileId>,
    maps: Option<File>,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory { last: None, maps: None });

/// Opens what will be needed while that is still possible.
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

/// The file that a line of /proc/self/maps is about, if it is mapped shared (proc_pid_maps(5)).
fn shared_mapping(line: &str) -> Option<FileId> {
    let mut fields = line.split_ascii_whitespace();
    let (_range, access, _offset, device, inode) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (major, minor) = device.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    access.ends_with('s').then_some((number(major)?, number(minor)?, inode.parse().ok()?))
}
