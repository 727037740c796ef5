//! The serving process's side: one request at a time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::message::{Answer, Reply, Request, What, receive, send};
use crate::addr::Qva;
use crate::memory::FileId;
use crate::vfio::{self, DeviceFile};
use crate::{handover, socket};

/// How long an answer may take. A process whose memory is locked delays the one about its mappings.
const LIMIT: Duration = Duration::from_secs(10);

/// See the top of this file.
#[derive(Clone)]
pub(super) struct Client(Arc<Mutex<Connection>>);

struct Connection {
    socket: OwnedFd,
    number: u64,
}

impl Client {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(Mutex::new(Connection { socket, number: 0 })))
    }

    /// Lets the helper do what it is there for.
    pub(super) fn install(self) {
        let (opener, starter, finder, asker) = (self.clone(), self.clone(), self.clone(), self);
        // The helper knows the address of the only function.
        vfio::open_by(Box::new(move |_, file| opener.open(file)));
        vfio::find_holder_by(Box::new(move |_| finder.holder()));
        handover::start_by(Box::new(move |socket| starter.start(socket)));
        socket::look_at_maps_by(Box::new(move |pid, file, address| asker.maps(pid, file, address)));
    }

    pub(super) fn open(&self, file: DeviceFile) -> io::Result<OwnedFd> {
        let what = match file {
            DeviceFile::Cdev => What::OpenCdev,
            DeviceFile::Group => What::OpenGroup,
            DeviceFile::Container => What::OpenContainer,
        };
        match self.ask(what, None)? {
            (Answer::Opened, Some(fd)) => Ok(fd),
            other => Err(failed(&other.0)),
        }
    }

    pub(super) fn start(&self, socket: OwnedFd) -> io::Result<(u32, OwnedFd)> {
        match self.ask(What::Start, Some(socket))? {
            (Answer::Started { pid }, Some(pidfd)) => Ok((pid, pidfd)),
            other => Err(failed(&other.0)),
        }
    }

    pub(super) fn maps(&self, pid: u32, file: FileId, address: Option<Qva>) -> io::Result<bool> {
        match self.ask(What::Maps { pid, file, address: address.map(|address| address.0) }, None)? {
            (Answer::Maps { privately }, _) => Ok(privately),
            other => Err(failed(&other.0)),
        }
    }

    /// `None` also if the helper does not answer: this is for a message.
    pub(super) fn holder(&self) -> Option<u32> {
        match self.ask(What::Holder, None).ok()?.0 {
            Answer::Holder { pid } => pid,
            _ => None,
        }
    }

    fn ask(&self, what: What, fd: Option<OwnedFd>) -> io::Result<(Answer, Option<OwnedFd>)> {
        let mut connection = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        connection.number += 1;
        let number = connection.number;
        send(&connection.socket, &Request { number, what }, fd.as_ref().map(AsFd::as_fd))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            wait(&connection.socket, deadline)?;
            let ended = || io::Error::other("the helper process has ended; restart this program");
            let (reply, fd): (Reply, _) = receive(&connection.socket)?.ok_or_else(ended)?;
            // An answer that came too late is for a request before.
            if reply.number == number {
                return Ok((reply.answer, fd));
            }
        }
    }
}

fn wait(socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let time = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&time)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the helper process does not answer")),
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map(drop).map_err(Into::into),
        }
    }
}

fn failed(answer: &Answer) -> io::Error {
    match answer {
        Answer::Failed(errno) => io::Error::from_raw_os_error(*errno),
        other => io::Error::other(format!("the helper process answered {other:?}")),
    }
}
