//! Calls that a thread in the sandbox must not make, for the tests of the sandbox.

use std::ffi::CStr;
use std::io;
use std::ptr;

const LEN: usize = 4096;

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `execve`.
pub(crate) fn execute(program: &CStr) -> io::Result<()> {
    let arguments = [program.as_ptr(), ptr::null()];
    // SAFETY: both arrays end with a null pointer, and the strings outlive the call.
    checked(unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), arguments[1..].as_ptr()) }.into())
}

/// `clone` as `fork` uses it.
pub(crate) fn start_process() -> io::Result<()> {
    // SAFETY: as `fork`; a child would end at once.
    let result = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if result == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    checked(result)
}

/// Maps a page, and unmaps it.
pub(crate) fn map(executable: bool) -> io::Result<()> {
    let protection = libc::PROT_READ | if executable { libc::PROT_EXEC } else { libc::PROT_WRITE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address that the kernel chooses, which nobody uses.
    let page = unsafe { libc::mmap(ptr::null_mut(), LEN, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the page was mapped above, and nobody uses it.
    checked(unsafe { libc::munmap(page, LEN) }.into())
}

/// Maps a page, and makes it executable.
pub(crate) fn make_executable() -> io::Result<()> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: as in `map`.
    let page = unsafe { libc::mmap(ptr::null_mut(), LEN, protection, flags, -1, 0) };
    // SAFETY: nobody uses the page.
    checked(unsafe { libc::mprotect(page, LEN, libc::PROT_READ | libc::PROT_EXEC) }.into())
}

/// An ioctl with which a terminal would get input (`TIOCSTI`).
pub(crate) fn ioctl(fd: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one byte of the string.
    checked(unsafe { libc::ioctl(fd, libc::TIOCSTI, c"x".as_ptr()) }.into())
}

/// Asks whether process 1 can be signalled.
pub(crate) fn signal_init() -> io::Result<()> {
    // SAFETY: signal 0 is not delivered.
    checked(unsafe { libc::kill(1, 0) }.into())
}
