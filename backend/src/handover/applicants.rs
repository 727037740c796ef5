//! Who asks to be the successor: a process that connects to the socket, or the installed program, which SIGUSR2 starts. One is
//! heard at a time, and only for a limited time; nothing here waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::description::{Description, ListenerState};
use super::descriptors::{Incoming, Outgoing};
use super::link::{LIMIT, Link, LinkError};
use super::listener::{Applicant, Listener, may_apply};
use super::memory_file;
use super::message::{Hello, Message};
use super::predecessor::Successor;
use super::process::SuccessorProcess;
use super::spawn::start;
use super::terms::Terms;
use crate::rate_limited_log::SharedLog;
use crate::sys::Poller;

const LISTENER: u64 = 0;
const SIGNAL: u64 = 1;
const APPLICANT: u64 = 2;
const TIMER: u64 = 3;

/// Anybody with the right user can connect again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// Hears who asks to be the successor.
pub struct Applicants {
    terms: Terms,
    listener: Option<Listener>,
    /// Readable after SIGUSR2.
    signal: OwnedFd,
    poller: Poller,
    /// Ends the time of the one that is heard.
    timer: OwnedFd,
    heard: Option<Predecessor>,
}

/// This process, toward a successor that it has accepted.
pub struct Predecessor {
    link: Link,
    process: SuccessorProcess,
}

impl Applicants {
    /// `signal` is readable after SIGUSR2.
    ///
    /// # Errors
    /// The errno of `epoll` or `timerfd_create`.
    pub fn new(terms: Terms, signal: OwnedFd) -> io::Result<Self> {
        let poller = Poller::new()?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        poller.add(&signal, SIGNAL)?;
        poller.add(&timer, TIMER)?;
        Ok(Self { terms, listener: None, signal, poller, timer, heard: None })
    }

    /// Listens at `path`.
    ///
    /// # Errors
    /// The errno.
    pub fn listen(&mut self, path: &Path) -> io::Result<()> {
        self.add(Listener::bind(path)?)
    }

    /// Listens with the predecessor's socket if that is at `path`. False if it is not.
    ///
    /// # Errors
    /// It is no listening socket.
    pub fn inherit(&mut self, path: &Path, state: ListenerState, descriptors: &mut Incoming) -> io::Result<bool> {
        match Listener::inherit(state, path, descriptors)? {
            Some(listener) => self.add(listener).map(|()| true),
            None => Ok(false),
        }
    }

    fn add(&mut self, listener: Listener) -> io::Result<()> {
        self.poller.add(&listener, LISTENER)?;
        log::info!("successors may connect to {}", listener.path().display());
        self.listener = Some(listener);
        Ok(())
    }

    /// What a successor needs to listen in place of this process.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn describe(&self, outgoing: &mut Outgoing) -> io::Result<Option<ListenerState>> {
        self.listener.as_ref().map(|listener| listener.describe(outgoing)).transpose()
    }

    /// Readable when [`Self::step`] should be called.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    /// Handles what has come, without waiting. Returns a successor whose terms are this process's.
    pub fn step(&mut self) -> Option<Predecessor> {
        let mut ready = Vec::new();
        let mark = |event: crate::sys::Event| ready.push(event.token);
        if let Err(error) = self.poller.wait(Some(Duration::ZERO), mark) {
            LOG.error(|| format!("wait for a successor: {error}"));
        }
        let mut number = [0; 128];
        let accepted = if ready.contains(&APPLICANT) { self.hear() } else { None };
        if ready.contains(&TIMER) && rustix::io::read(&self.timer, &mut number[..8]).is_ok() && self.heard.is_some() {
            self.dismiss(&format!("it has been silent for {LIMIT:?}"));
        }
        if ready.contains(&SIGNAL) && rustix::io::read(&self.signal, &mut number).is_ok() {
            self.start_successor();
        }
        if ready.contains(&LISTENER) {
            self.accept();
        }
        accepted
    }

    /// Accepts who has connected, unless another is being heard.
    fn accept(&mut self) {
        let accepted = self.listener.as_ref().map_or(Ok(None), Listener::accept);
        let applicant = match accepted {
            Ok(Some(applicant)) => applicant,
            Ok(None) => return,
            Err(error) => return LOG.error(|| format!("accept a successor: {error}")),
        };
        let Applicant { mut link, pid, uid } = applicant;
        let refused = if !may_apply(uid, rustix::process::geteuid().as_raw()) {
            Some(format!("it belongs to user {uid}; only this user and root may take over"))
        } else if self.heard.is_some() {
            Some("another process is being heard".to_owned())
        } else {
            None
        };
        if let Some(reason) = refused {
            refuse(&mut link, &reason, pid);
            return;
        }
        match SuccessorProcess::of_peer(pid) {
            Ok(process) => self.start_hearing(Predecessor { link, process }),
            Err(error) => refuse(&mut link, &error.to_string(), pid),
        }
    }

    /// Starts the installed program as successor.
    fn start_successor(&mut self) {
        if self.heard.is_some() {
            return LOG.warn(|| "SIGUSR2: another process is being heard".to_owned());
        }
        let started = || -> io::Result<Predecessor> {
            let (link, theirs) = Link::pair()?;
            Ok(Predecessor { link, process: start(theirs.into_socket())? })
        };
        match started() {
            Ok(predecessor) => {
                LOG.info(|| format!("SIGUSR2: started the successor, process {}", predecessor.process.pid()));
                self.start_hearing(predecessor);
            }
            Err(error) => LOG.error(|| format!("SIGUSR2: {error}")),
        }
    }

    fn start_hearing(&mut self, predecessor: Predecessor) {
        let watched = self.poller.add(&predecessor.link, APPLICANT).and_then(|()| self.set_timer(LIMIT));
        self.heard = Some(predecessor);
        if let Err(error) = watched {
            self.dismiss(&error.to_string());
        }
    }

    fn set_timer(&self, after: Duration) -> io::Result<()> {
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = Timespec::try_from(after).map_err(io::Error::other)?;
        let time = Itimerspec { it_interval: none, it_value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }

    /// Reads the HELLO of the one that is heard.
    fn hear(&mut self) -> Option<Predecessor> {
        let heard = self.heard.as_mut()?;
        match heard.link.receive().map_err(|error| error.to_string()).and_then(|message| judge(&self.terms, message)) {
            Ok(hello) => {
                let pid = heard.process.pid();
                // What the other process says of itself is escaped and cut.
                let program: String = hello.program.escape_debug().take(20).collect();
                LOG.info(|| format!("process {pid} (version {program}) asks to take over"));
                self.forget()
            }
            Err(reason) => {
                self.dismiss(&reason);
                None
            }
        }
    }

    /// Hears nobody any more.
    fn forget(&mut self) -> Option<Predecessor> {
        let heard = self.heard.take()?;
        let undone = self.poller.remove(&heard.link).and_then(|()| self.set_timer(Duration::ZERO));
        if let Err(error) = undone {
            LOG.error(|| format!("stop hearing process {}: {error}", heard.process.pid()));
        }
        Some(heard)
    }

    fn dismiss(&mut self, reason: &str) {
        if let Some(mut heard) = self.forget() {
            heard.refuse(reason);
        }
    }
}

/// Decides about the first message.
fn judge(terms: &Terms, message: Message) -> Result<Hello, String> {
    match message {
        Message::Hello(hello) => match terms.conflict(&hello.terms) {
            Some(conflict) => Err(conflict),
            None => Ok(hello),
        },
        other => Err(format!("it began with {}, not with HELLO", other.name())),
    }
}

fn refuse(link: &mut Link, reason: &str, pid: Option<u32>) {
    LOG.warn(|| format!("process {} may not take over: {reason}", pid.map_or("?".to_owned(), |pid| pid.to_string())));
    // If it is gone, there is nobody to tell.
    let _ = link.send(&Message::Refused(reason.to_owned()));
}

impl Predecessor {
    /// The successor's process id.
    #[must_use]
    pub fn successor(&self) -> u32 {
        self.process.pid()
    }

    fn expect(&mut self, due: &Message) -> Result<(), String> {
        match self.link.receive() {
            Ok(message) if message == *due => Ok(()),
            Ok(Message::Failed(reason)) => Err(format!("the successor failed: {reason}")),
            Ok(other) => Err(format!("the successor sent {}, {} was due", other.name(), due.name())),
            Err(LinkError::Closed) => Err(format!("the successor is gone; {} was due", due.name())),
            Err(error) => Err(format!("{error}; {} was due", due.name())),
        }
    }
}

impl Successor<(Description, Outgoing)> for Predecessor {
    fn refuse(&mut self, reason: &str) {
        refuse(&mut self.link, reason, Some(self.process.pid()));
    }

    fn send(&mut self, (description, outgoing): (Description, Outgoing)) -> Result<(), String> {
        let text = memory_file::write(&description).map_err(|error| error.to_string())?;
        let sent = |link: &mut Link| -> Result<(), LinkError> {
            link.send(&Message::Session { descriptors: outgoing.as_slice().len() + 1 })?;
            link.send_descriptors(std::slice::from_ref(&text))?;
            link.send_descriptors(outgoing.as_slice())
        };
        sent(&mut self.link).map_err(|error| error.to_string())
    }

    fn await_ready(&mut self) -> Result<(), String> {
        self.expect(&Message::Ready)
    }

    fn go(&mut self) -> Result<(), String> {
        self.link.send(&Message::Go).map_err(|error| error.to_string())
    }

    fn await_taken(&mut self) -> Result<(), String> {
        self.expect(&Message::Taken)
    }

    fn close(&mut self) -> bool {
        self.link.shut();
        self.link.drain_taken()
    }

    fn end(&mut self) {
        if !self.process.end() {
            log::error!("process {} cannot be ended; it may still use the drive", self.process.pid());
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::handover::terms::tests::terms;

    /// No signal comes.
    fn signal() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    fn hear(terms_of_applicant: Terms, version: u32) -> (Option<Predecessor>, Result<Message, LinkError>) {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("handover");
        let mut applicants = Applicants::new(terms(), signal()).unwrap();
        applicants.listen(&path).unwrap();
        let mut link = Link::connect(&path).unwrap().with_limit(Duration::from_millis(100));
        link.send(&Message::Hello(Hello { version, ..Hello::new(terms_of_applicant) })).unwrap();
        assert!(applicants.step().is_none(), "it is accepted first");
        let accepted = applicants.step();
        (accepted, link.receive())
    }

    #[test]
    fn a_process_with_the_same_terms_is_accepted() {
        let (accepted, _) = hear(terms(), 1);
        assert_eq!(accepted.map(|predecessor| predecessor.successor()), Some(std::process::id()));
    }

    #[test]
    fn a_process_with_other_terms_or_of_another_version_is_told_why_it_is_refused() {
        let (accepted, answer) = hear(Terms { queues: 5, ..terms() }, 1);
        assert!(accepted.is_none());
        assert!(matches!(answer, Ok(Message::Refused(reason)) if reason.contains("--queues 2, the successor 5")));
        let (accepted, answer) = hear(terms(), 2);
        assert!(accepted.is_none());
        assert!(matches!(answer, Ok(Message::Refused(reason)) if reason.contains("version 2")));
    }

    #[test]
    fn a_second_process_is_sent_away_while_the_first_is_heard() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("handover");
        let mut applicants = Applicants::new(terms(), signal()).unwrap();
        applicants.listen(&path).unwrap();
        let _silent = Link::connect(&path).unwrap();
        assert!(applicants.step().is_none());

        let mut second = Link::connect(&path).unwrap();
        assert!(applicants.step().is_none());

        assert!(matches!(second.receive(), Ok(Message::Refused(reason)) if reason.contains("is being heard")));
    }
}
