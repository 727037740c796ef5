//! The front-end's process: its name for the log, and its mappings of the shared memory, to detect memory that is shared with
//! this process but not with the guest.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::addr::Qva;
use crate::memory::FileId;
use crate::sys::{Credentials, peer_credentials};

/// Time-out for `/proc/PID/maps`. The kernel takes the lock of that process's address space, and the process can hold it while
/// a file system that it serves itself does not answer.
const MAPS_TIMEOUT: Duration = Duration::from_secs(1);
/// Questions that may be without an answer. Beyond them none is asked.
const MAX_UNANSWERED: usize = 64;

/// The process at the other end of a socket.
pub(crate) struct Peer {
    credentials: Credentials,
    name: String,
}

impl Peer {
    pub(crate) fn of(socket: impl AsFd) -> io::Result<Self> {
        let credentials = peer_credentials(socket)?;
        let comm = credentials.pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        // Escaped, because a process can set its own name, and must not write control characters into the log.
        let name = comm.map_or_else(|| "unknown program".into(), |name| name.trim_end().escape_debug().to_string());
        Ok(Self { credentials, name })
    }

    /// Its process id, if it is visible in this PID namespace.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.credentials.pid
    }

    /// Its user.
    pub(crate) fn uid(&self) -> u32 {
        self.credentials.uid
    }

    /// True if the process has mapped this file privately: at `address`, or with `None` in all its mappings. QEMU up to 10 shares
    /// such memory, although the guest's writes to it reach neither this process nor the device.
    pub(crate) fn maps_privately(&self, file: FileId, address: Option<Qva>) -> bool {
        let Some(pid) = self.credentials.pid else { return false };
        match LOOKER.get() {
            Some(look) => look(pid, file, address).unwrap_or_else(|error| {
                log::debug!("the mappings of process {pid}: {error}");
                false
            }),
            None => maps_privately(pid, file, address),
        }
    }
}

/// Tells whether the process with a number maps a file privately.
pub type MapsFn = dyn Fn(u32, FileId, Option<Qva>) -> io::Result<bool> + Send + Sync;

static LOOKER: OnceLock<Box<MapsFn>> = OnceLock::new();

/// From now on `look` looks at mappings, in place of this process. Only the first call has an effect.
pub fn look_at_maps_by(look: Box<MapsFn>) {
    // A second one would be for the same process.
    let _ = LOOKER.set(look);
}

/// As [`Peer::maps_privately`], for process `pid`, by this process.
pub(crate) fn maps_privately(pid: u32, file: FileId, address: Option<Qva>) -> bool {
    // Not readable for another user's process, or from another PID namespace: then the mapping counts as shared.
    let maps = ask(MAPS_TIMEOUT, move || fs::read_to_string(format!("/proc/{pid}/maps")));
    maps.is_some_and(|maps| match address {
        Some(address) => is_private(&maps, file.inode(), address),
        None => is_private_everywhere(&maps, &file.to_string()),
    })
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.credentials.pid {
            Some(pid) => write!(f, "{} (pid {pid}, uid {})", self.name, self.credentials.uid),
            None => write!(f, "{} (pid not visible from here, uid {})", self.name, self.credentials.uid),
        }
    }
}

/// Asks `question` on a thread of its own, which is left behind if there is no answer in time.
fn ask(limit: Duration, question: impl FnOnce() -> io::Result<String> + Send + 'static) -> Option<String> {
    static UNANSWERED: AtomicUsize = AtomicUsize::new(0);
    if UNANSWERED.fetch_add(1, Relaxed) >= MAX_UNANSWERED {
        UNANSWERED.fetch_sub(1, Relaxed);
        return None;
    }
    let (sender, answer) = channel();
    let asking = std::thread::Builder::new().name("peer".into()).spawn(move || {
        let _ = sender.send(question());
        UNANSWERED.fetch_sub(1, Relaxed);
    });
    if asking.is_err() {
        UNANSWERED.fetch_sub(1, Relaxed);
    }
    answer.recv_timeout(limit).ok()?.ok()
}

/// True if `/proc/PID/maps` (proc(5): `start-end perms offset dev inode path`) has a private mapping of `inode` at `address`.
fn is_private(maps: &str, inode: u64, address: Qva) -> bool {
    let holds = |line: &&str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        Some(start <= address.0 && address.0 < end)
    };
    let Some(line) = maps.lines().find(|line| holds(line) == Some(true)) else { return false };
    let mut fields = line.split_ascii_whitespace();
    let private = fields.nth(1).is_some_and(|permissions| permissions.ends_with('p'));
    let same_file = fields.nth(2).is_some_and(|found| found.parse() == Ok(inode));
    private && same_file
}

/// True if all mappings of `file` (device and inode, as in `/proc/PID/maps`) are private, and there is at least one.
fn is_private_everywhere(maps: &str, file: &str) -> bool {
    let permissions = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let permissions = fields.next()?.to_owned();
        let found = format!("{} {}", fields.nth(1)?, fields.next()?);
        (found == file).then_some(permissions)
    };
    let mut found = maps.lines().filter_map(permissions).peekable();
    found.peek().is_some() && found.all(|permissions| permissions.ends_with('p'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    const MAPS: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:01 1034                       /memfd:shared (deleted)
7f0000400000-7f0000800000 rw-p 00000000 00:01 1035                       /memfd:private (deleted)
7f0000800000-7f0000900000 rw-p 00000000 00:00 0
";

    #[test]
    fn a_private_mapping_of_the_same_file_is_found() {
        assert!(is_private(MAPS, 1035, Qva(0x7f00_0040_0000)));
        assert!(is_private(MAPS, 1035, Qva(0x7f00_007f_ffff)));
    }

    #[test]
    fn any_other_mapping_counts_as_shared() {
        assert!(!is_private(MAPS, 1034, Qva(0x7f00_0000_0000)), "shared");
        assert!(!is_private(MAPS, 1034, Qva(0x7f00_0040_0000)), "another file");
        assert!(!is_private(MAPS, 1034, Qva(0x1000)), "nothing there");
        assert!(!is_private("no maps\n\n-\n", 0, Qva(0)), "another format");
    }

    #[test]
    fn a_file_that_is_mapped_privately_everywhere_is_found_without_an_address() {
        assert!(is_private_everywhere(MAPS, "00:01 1035"));
        assert!(!is_private_everywhere(MAPS, "00:01 1034"), "shared");
        assert!(!is_private_everywhere(MAPS, "00:02 1035"), "another device");
        assert!(!is_private_everywhere(&MAPS.replace("1035", "1034"), "00:01 1034"), "both");
    }

    #[test]
    fn a_peer_that_does_not_answer_is_not_waited_for() {
        let (_never, blocked) = channel::<String>();
        assert_eq!(ask(Duration::from_millis(1), move || blocked.recv().map_err(io::Error::other)), None);
        assert_eq!(ask(Duration::from_secs(20), || Ok("maps".into())), Some("maps".into()));
    }

    #[test]
    fn a_peer_is_displayed_with_its_pid() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert!(peer.to_string().contains(&format!("pid {}", std::process::id())), "{peer}");
    }
}
