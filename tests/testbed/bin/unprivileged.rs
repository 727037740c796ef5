//! `unprivileged ROOT NAME=FILE… NAME=listen:SOCKET… -- PROGRAM [ARGUMENT…]`: runs a program as nobody, with ROOT as the only file
//! system that it can see. What the program needs is opened before, and passed to it as systemd does (LISTEN_FDS, LISTEN_FDNAMES).
//! To be run in a mount namespace of its own, in which a file system is mounted at ROOT.

use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::chroot;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use command_fds::{CommandFdExt, FdMapping};
use rustix::mount::mount_move;

const USAGE: &str = "usage: unprivileged ROOT NAME=FILE… NAME=listen:SOCKET… -- PROGRAM [ARGUMENT…]";
/// The first descriptor that is passed (sd_listen_fds(3)).
const FIRST: i32 = 3;
/// Its user and group.
const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let Err(error) = run(&words);
    eprintln!("unprivileged: {error}");
    ExitCode::FAILURE
}

fn run(words: &[String]) -> Result<std::convert::Infallible, Box<dyn Error>> {
    let (root, words) = words.split_first().ok_or(USAGE)?;
    let end = words.iter().position(|word| word == "--").ok_or(USAGE)?;
    let (passed, command) = (&words[..end], &words[end + 1..]);
    let (program, arguments) = command.split_first().ok_or(USAGE)?;
    let (mut names, mut mappings) = (Vec::new(), Vec::new());
    for (child_fd, word) in (FIRST..).zip(passed) {
        let (name, what) = word.split_once('=').ok_or(USAGE)?;
        let parent_fd = open(what).map_err(|error| format!("{what}: {error}"))?;
        names.push(name);
        mappings.push(FdMapping { parent_fd, child_fd });
    }
    std::env::set_current_dir(root)?;
    mount_move(".", "/")?;
    chroot(".")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").uid(NOBODY).gid(NOBODY).fd_mappings(mappings)?;
    command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    // The program runs in this process.
    command.env("LISTEN_PID", std::process::id().to_string());
    Err(command.exec().into())
}

fn open(what: &str) -> std::io::Result<OwnedFd> {
    match what.strip_prefix("listen:") {
        Some(path) => UnixListener::bind(path).map(OwnedFd::from),
        None => File::options().read(true).write(true).open(what).map(OwnedFd::from),
    }
}
