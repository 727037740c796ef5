//! The thread that serves the clients.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::client::{Client, Outcome};
use super::dialogue::{Dialogue, Job};
use super::listener::LocalListener;
use crate::eventfd::{drain, signal};
use crate::rate_limited_log::SharedLog;
use crate::sandbox::{Entry, Role};
use crate::sys::Poller;

/// Clients served at a time. More are sent away.
pub(super) const MOST_CLIENTS: usize = 16;
/// Pause after `accept` has failed, as it does for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const JOB: u64 = 2;
const FIRST_CLIENT: u64 = 3;

/// Anybody with the right user can connect again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// Which users may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// This process's and root.
    OwnUser,
    /// Whoever can connect.
    Anybody,
}

/// The running server. Dropping it ends it and closes its connections; a job that is running is not waited for.
pub struct LocalServer {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl LocalServer {
    /// Serves who connects to `listener`, in a thread called `name`.
    ///
    /// # Errors
    /// The errno of making the thread or a descriptor.
    pub fn start<D: Dialogue + 'static>(
        name: &str,
        listener: LocalListener,
        admission: Admission,
        dialogue: D,
    ) -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (stop, job_done) = (Arc::new(event()?), Arc::new(event()?));
        let poller = Poller::new()?;
        poller.add(&*stop, STOP)?;
        poller.add(&listener, LISTENER)?;
        poller.add(&*job_done, JOB)?;
        let (sender, replies) = channel();
        let jobs = Jobs { sender, replies, done: job_done, client: None };
        let (clients, next, again) = (HashMap::new(), FIRST_CLIENT, Vec::new());
        let mut serving = Serving { listener, admission, dialogue, poller, clients, next, again, jobs };
        let entry = Entry::new(Role::Guard);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            entry.enter();
            serving.run();
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        signal(&*self.stop);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("bug: the thread that serves local clients panicked");
        }
    }
}

/// The job that runs in a thread of its own.
struct Jobs {
    sender: Sender<Vec<u8>>,
    replies: Receiver<Vec<u8>>,
    done: Arc<OwnedFd>,
    /// For whom one is running.
    client: Option<u64>,
}

struct Serving<D> {
    listener: LocalListener,
    admission: Admission,
    dialogue: D,
    poller: Poller,
    clients: HashMap<u64, Client>,
    /// Number of the next client. None is used again, so that no reply reaches another client.
    next: u64,
    /// Clients that have more requests.
    again: Vec<u64>,
    jobs: Jobs,
}

impl<D: Dialogue> Serving<D> {
    fn run(&mut self) {
        loop {
            let mut ready = std::mem::take(&mut self.again);
            let timeout = if ready.is_empty() { self.until_deadline() } else { Some(Duration::ZERO) };
            if let Err(error) = self.poller.wait(timeout, |event| ready.push(event.token)) {
                LOG.error(|| format!("wait for local clients: {error}"));
                std::thread::sleep(ACCEPT_PAUSE);
            }
            for token in ready {
                match token {
                    STOP => return,
                    LISTENER => self.accept(),
                    JOB => self.finish_job(),
                    client => self.serve(client),
                }
            }
            self.close_overdue();
        }
    }

    fn until_deadline(&self) -> Option<Duration> {
        let next = self.clients.values().filter_map(Client::deadline).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn close_overdue(&mut self) {
        let now = Instant::now();
        let overdue = |client: &Client| client.deadline().is_some_and(|deadline| deadline <= now);
        let overdue: Vec<_> = self.clients.iter().filter(|(_, client)| overdue(client)).map(|(n, _)| *n).collect();
        overdue.into_iter().for_each(|client| self.close(client));
    }

    fn accept(&mut self) {
        let (socket, uid) = match self.listener.accept() {
            Ok(Some(client)) => client,
            Ok(None) => return,
            Err(error) => {
                LOG.error(|| format!("accept a local client: {error}"));
                std::thread::sleep(ACCEPT_PAUSE);
                return;
            }
        };
        let mut client = Client::new(socket);
        let own = rustix::process::geteuid().as_raw();
        let reason = match uid {
            Some(uid) if self.admission == Admission::OwnUser && uid != own && uid != 0 => {
                Some(format!("you are user {uid}; only user {own} and root may ask"))
            }
            _ if self.clients.len() >= MOST_CLIENTS => Some(format!("{MOST_CLIENTS} clients are connected already")),
            _ => None,
        };
        if let Some(reason) = reason {
            LOG.warn(|| format!("sent a local client away: {reason}"));
            client.dismiss(self.dialogue.refused(&reason));
            // What fits into the socket's buffer reaches it; nobody waits for more.
            let _ = client.go_on(&mut self.dialogue);
            return;
        }
        let number = self.next;
        self.next += 1;
        match self.poller.add_duplex(client.as_fd(), number) {
            Ok(()) => drop(self.clients.insert(number, client)),
            Err(error) => LOG.error(|| format!("watch a local client: {error}")),
        }
    }

    fn serve(&mut self, number: u64) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        match client.go_on(&mut self.dialogue) {
            Outcome::Wait => {}
            Outcome::Again => self.again.push(number),
            Outcome::Run(job) => self.start_job(number, job),
            Outcome::Close => self.close(number),
        }
    }

    fn close(&mut self, number: u64) {
        if let Some(client) = self.clients.remove(&number)
            && let Err(error) = self.poller.remove(client.as_fd())
        {
            LOG.error(|| format!("stop watching a local client: {error}"));
        }
    }

    fn start_job(&mut self, number: u64, job: Job) {
        let started = self.jobs.client.is_none().then(|| {
            let (sender, done) = (self.jobs.sender.clone(), Arc::clone(&self.jobs.done));
            std::thread::Builder::new().name("vdv-job".into()).spawn(move || {
                let _ = sender.send(job());
                signal(&*done);
            })
        });
        match started {
            Some(Ok(_)) => self.jobs.client = Some(number),
            Some(Err(error)) => {
                let reply = self.dialogue.refused(&error.to_string());
                self.answer(number, reply);
            }
            None => {
                let reply = self.dialogue.busy();
                self.answer(number, reply);
            }
        }
    }

    fn finish_job(&mut self) {
        drain(&*self.jobs.done);
        if let Ok(reply) = self.jobs.replies.try_recv()
            && let Some(number) = self.jobs.client.take()
        {
            self.answer(number, reply);
        }
    }

    /// Sends a reply to a client that waits for a job, if it is still there.
    fn answer(&mut self, number: u64, reply: Vec<u8>) {
        if let Some(client) = self.clients.get_mut(&number) {
            client.answer(reply);
            self.again.push(number);
        }
    }
}

#[cfg(test)]
mod tests;
