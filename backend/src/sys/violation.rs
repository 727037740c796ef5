//! What happens to a thread whose seccomp filter refuses a system call: the kernel does not execute the call and sends SIGSYS
//! (`SECCOMP_RET_TRAP`); the handler names the call and the thread, and ends the process. `SECCOMP_RET_KILL_PROCESS` would leave the
//! name to the kernel's audit log, which an unprivileged operator cannot read.
//!
//! The handler makes three system calls, which are async-signal-safe (signal-safety(7)) and in every filter.

use std::io;

/// Longest name of a thread, with its zero byte (`PR_GET_NAME`).
const NAME: usize = 16;
/// `SI_CODE` of a SIGSYS by seccomp (`SYS_SECCOMP`).
const BY_SECCOMP: i32 = 1;
/// `siginfo_t` of SIGSYS (sigaction(2)): `si_signo`, `si_errno`, `si_code`, padding, `si_call_addr`, `si_syscall`, `si_arch`.
const SYSCALL_AT: usize = 24;

/// Installs the handler.
///
/// # Errors
/// The errno of `sigaction`.
pub fn report_violations() -> io::Result<()> {
    // SAFETY: `sigaction` is plain data, for which all zeroes is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigsys as *const () as usize;
    // SA_NODEFER: the handler ends the process with the same signal.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: `action` is initialised, the handler is async-signal-safe, and a null pointer discards the old action.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigsys(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t.
    let code = unsafe { (*info).si_code };
    if code == BY_SECCOMP {
        // SAFETY: a SIGSYS by seccomp has the number of the call at this offset, within the 128 bytes of siginfo_t.
        let call = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<i32>().read_unaligned() };
        let mut name = [0_u8; NAME];
        // SAFETY: the kernel writes at most 16 bytes, the size of `name`.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let (line, length) = line(&name, call.unsigned_abs());
        // SAFETY: `line` is readable for `length` bytes. If nobody reads standard error, there is nobody to tell.
        unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length) };
    }
    // SAFETY: both are async-signal-safe. The default action of SIGSYS ends the process, and tells its parent why.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::raise(libc::SIGSYS);
        libc::_exit(128 + libc::SIGSYS);
    }
}

/// The line, without any allocation.
fn line(name: &[u8; NAME], call: u32) -> ([u8; 192], usize) {
    let mut line = ([0; 192], 0);
    let mut digits = [0; 10];
    append(&mut line, b"vhost-device-vfio: sandbox: thread ");
    append(&mut line, &name[..name.iter().position(|&byte| byte == 0).unwrap_or(NAME)]);
    append(&mut line, b" made system call ");
    append(&mut line, decimal(call, &mut digits));
    append(&mut line, b", which its seccomp filter does not allow; this process ends (--sandbox off serves without)\n");
    line
}

fn append(line: &mut ([u8; 192], usize), text: &[u8]) {
    for &byte in text {
        if let Some(slot) = line.0.get_mut(line.1) {
            *slot = byte;
            line.1 += 1;
        }
    }
}

fn decimal(mut number: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
        if number == 0 {
            return &digits[first..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_names_the_thread_and_the_number_of_the_call() {
        for (name, call, part) in [
            (*b"vdv-worker-0\0\0\0\0", 257, "thread vdv-worker-0 made system call 257, which"),
            (*b"0123456789abcdef", 0, "thread 0123456789abcdef made system call 0, which"),
            (*b"a\0xxxxxxxxxxxxxx", u32::MAX, "thread a made system call 4294967295, which"),
        ] {
            let (line, length) = line(&name, call);
            let text = String::from_utf8(line[..length].to_vec()).unwrap();
            assert!(text.contains(part) && text.ends_with("serves without)\n"), "{text}");
        }
    }
}
