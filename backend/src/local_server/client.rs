//! One client: what it has sent, what it has not read yet, and how long it may take.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::dialogue::{Dialogue, Job, Step};

/// Time for a request from its first byte to its last, and for a reply to be read.
pub(super) const EXCHANGE_TIME: Duration = Duration::from_secs(5);
/// Time between two requests.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(120);
/// Requests of one client that are handled before others get their turn.
const TURN: u32 = 8;

/// A connected client.
pub(super) struct Client {
    socket: OwnedFd,
    input: Vec<u8>,
    /// The reply, and how much of it has been written.
    output: Vec<u8>,
    written: usize,
    /// The connection ends when the reply has been read.
    last: bool,
    waits_for_job: bool,
    deadline: Instant,
}

/// What is to be done about a client.
pub(super) enum Outcome {
    /// It will be reported when there is more.
    Wait,
    /// It has more requests, and has had its turn.
    Again,
    /// The job is to be run for it.
    Run(Job),
    /// The connection ends.
    Close,
}

impl Client {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            last: false,
            waits_for_job: false,
            deadline: Instant::now() + EXCHANGE_TIME,
        }
    }

    /// When its connection ends unless it goes on; `None` while it waits for this process.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.waits_for_job).then_some(self.deadline)
    }

    /// Sends the reply of its job, or another one instead.
    pub(super) fn answer(&mut self, reply: Vec<u8>) {
        self.waits_for_job = false;
        self.reply(reply, false);
    }

    /// Sends a reply after which the connection ends.
    pub(super) fn dismiss(&mut self, reply: Vec<u8>) {
        self.reply(reply, true);
    }

    fn reply(&mut self, bytes: Vec<u8>, last: bool) {
        (self.output, self.written, self.last) = (bytes, 0, last);
        self.deadline = Instant::now() + EXCHANGE_TIME;
    }

    /// Goes on until the client has to do something, or has had its turn.
    pub(super) fn go_on<D: Dialogue>(&mut self, dialogue: &mut D) -> Outcome {
        let mut turn = 0;
        loop {
            match self.flush() {
                Ok(true) if self.last => return Outcome::Close,
                Ok(true) => {}
                Ok(false) => return Outcome::Wait,
                Err(_) => return Outcome::Close,
            }
            if self.waits_for_job {
                return Outcome::Wait;
            }
            if turn == TURN {
                return Outcome::Again;
            }
            match dialogue.step(&mut self.input) {
                Step::Reply(bytes) => {
                    turn += 1;
                    self.reply(bytes, false);
                    continue;
                }
                Step::Last(bytes) => {
                    self.reply(bytes, true);
                    continue;
                }
                Step::Later(job) => {
                    self.waits_for_job = true;
                    return Outcome::Run(job);
                }
                Step::Incomplete => {}
            }
            if self.input.len() >= D::MOST_BYTES {
                self.reply(dialogue.too_long(), true);
                continue;
            }
            if let Some(outcome) = self.receive(D::MOST_BYTES) {
                return outcome;
            }
        }
    }

    /// Writes what is left of the reply. True if nothing is.
    fn flush(&mut self) -> Result<bool, Errno> {
        while self.written < self.output.len() {
            match send(&self.socket, &self.output[self.written..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => self.written += count,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        if !self.output.is_empty() {
            self.output = Vec::new();
            self.deadline = Instant::now() + IDLE_TIME;
        }
        Ok(true)
    }

    /// Reads some bytes. `Some` if there are none.
    fn receive(&mut self, most: usize) -> Option<Outcome> {
        let mut bytes = [0; 1024];
        let room = bytes.len().min(most - self.input.len());
        match recv(&self.socket, &mut bytes[..room], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Some(Outcome::Close),
            Ok((_, count)) => {
                if self.input.is_empty() {
                    self.deadline = Instant::now() + EXCHANGE_TIME;
                }
                self.input.extend_from_slice(&bytes[..count]);
                None
            }
            Err(Errno::INTR) => None,
            Err(Errno::AGAIN) => Some(Outcome::Wait),
            Err(_) => Some(Outcome::Close),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
