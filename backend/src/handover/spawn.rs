//! Starts the installed program as successor, with the arguments of this process.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;

use super::process::SuccessorProcess;

/// What the kernel appends to the name of a running file that was replaced (proc_pid_exe(5)).
const DELETED: &[u8] = b" (deleted)";

/// Starts a successor with a socket as its standard input. Returns its number and a pidfd.
pub type StartFn = dyn Fn(OwnedFd) -> io::Result<(u32, OwnedFd)> + Send + Sync;

static STARTER: OnceLock<Box<StartFn>> = OnceLock::new();

/// From now on `start` starts successors, in place of this process. Only the first call has an effect.
pub fn start_by(start: Box<StartFn>) {
    // A second one would be for the same process.
    let _ = STARTER.set(start);
}

/// Starts it, by way of [`start_by`] if that was called.
///
/// # Errors
/// The errno, and the program.
pub(super) fn start(socket: OwnedFd) -> io::Result<SuccessorProcess> {
    match STARTER.get() {
        Some(start) => start(socket).map(|(pid, pidfd)| SuccessorProcess::of_pidfd(pid, pidfd)),
        None => SuccessorProcess::of_child(spawn(socket)?),
    }
}

/// Starts it as a child of this process, and waits for its end in the background. Returns its number and a pidfd.
///
/// # Errors
/// The errno, and the program.
pub(crate) fn start_here(socket: OwnedFd) -> io::Result<(u32, OwnedFd)> {
    // Dropping it starts the thread that waits.
    let process = SuccessorProcess::of_child(spawn(socket)?)?;
    Ok((process.pid(), process.duplicate()?))
}

/// Starts it, with `socket` as its standard input.
fn spawn(socket: OwnedFd) -> io::Result<Child> {
    let mut arguments = std::env::args_os();
    let program = program(arguments.next().as_deref(), std::fs::read_link("/proc/self/exe"))?;
    let mut command = Command::new(&program);
    command.args(without_takeover(arguments)).arg("--takeover-fd").arg("0").stdin(socket);
    command.spawn().map_err(|error| io::Error::new(error.kind(), format!("start {}: {error}", program.display())))
}

/// The path by which this process was started, or that of its file. By then a newer file may be there.
fn program(first: Option<&OsStr>, running: io::Result<PathBuf>) -> io::Result<PathBuf> {
    if let Some(path) = first.map(Path::new).filter(|path| path.as_os_str().as_bytes().contains(&b'/')) {
        return Ok(path.to_owned());
    }
    let running = running?.into_os_string().into_vec();
    let path = running.strip_suffix(DELETED).unwrap_or(&running);
    Ok(PathBuf::from(OsStr::from_bytes(path)))
}

/// The arguments, without those that made this process a successor itself.
fn without_takeover(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        match argument.as_bytes() {
            b"--takeover" | b"--takeover-fd" => drop(arguments.next()),
            other if other.starts_with(b"--takeover=") || other.starts_with(b"--takeover-fd=") => {}
            _ => kept.push(argument),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_the_start_is_started_again_even_if_its_file_was_replaced() {
        let exe = || Ok(PathBuf::from("/usr/bin/program (deleted)"));
        assert_eq!(program(Some("/opt/current/program".as_ref()), exe()).unwrap(), Path::new("/opt/current/program"));
        assert_eq!(program(Some("program".as_ref()), exe()).unwrap(), Path::new("/usr/bin/program"));
        assert_eq!(program(None, exe()).unwrap(), Path::new("/usr/bin/program"));
    }

    #[test]
    fn a_successor_passes_on_all_arguments_but_those_of_its_own_takeover() {
        let words = ["--takeover", "/h", "--device", "d", "--takeover=/h", "--takeover-fd", "0", "--queues", "2"];
        let kept = without_takeover(words.map(OsString::from).into_iter());
        assert_eq!(kept, ["--device", "d", "--queues", "2"]);
    }
}
