//! Commands from the control thread to a worker: a list, a flag that a busy worker reads once per pass at almost no cost, and
//! an eventfd that wakes a sleeping worker. Each command carries the channel for its reply.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::addr::{Gpa, Span};
use crate::driver::Queue;
use crate::engine::dirty_log::DirtyLogging;
use crate::engine::error::EngineError;
use crate::engine::inflight_policy::InflightPolicy;
use crate::engine::setup::VringSetup;
use crate::engine::suspension::Suspension;
use crate::eventfd::{drain, signal};
use crate::memory::MemTable;
use crate::sync::mpsc::{Receiver, Sender, channel};
use crate::sync::{AtomicBool, Mutex};

/// A command to a worker. The first `usize` of a vring's command is the worker's slot.
pub(in crate::engine) enum WorkerCommand {
    Start(usize, Box<VringSetup>, Sender<Result<(), EngineError>>),
    /// The reply comes when the last request taken from the ring has a used entry.
    Stop(usize, Sender<Option<u32>>),
    /// The same, or the last reply comes after a reset of the device, and what was in flight is left to the record.
    Suspend(usize, Sender<Suspension>),
    Enable(usize, bool, Sender<()>),
    Call(usize, Option<OwnedFd>, Sender<()>),
    Err(usize, Option<OwnedFd>, Sender<()>),
    Kick(usize, Option<OwnedFd>, Sender<()>),
    /// See [`crate::engine::VringSetup::used_log`].
    UsedLog(usize, Option<Gpa>, Sender<()>),
    /// Mark dirty pages there, or no longer.
    Log(Option<DirtyLogging>, Sender<()>),
    Publish(Arc<MemTable>, Sender<()>),
    /// The reply comes when no request in flight accesses the spans.
    RemoveMemory(Arc<MemTable>, Arc<[Span<Gpa>]>, Sender<()>),
    /// The reply comes when every completed write is durable; false if the flush failed.
    Flush(Sender<bool>),
    /// Submit nothing until `Resume`. The reply comes when the device has nothing in flight.
    Pause(Sender<()>),
    /// Submit again.
    Resume,
    /// Take no request until `Release`. The reply comes when every request taken has a used entry.
    Hold(Sender<()>),
    /// Take requests again.
    Release,
    /// Measure how long requests take, or no longer.
    Measure(bool),
    /// Give the device queue back, which is dropped there; the device is about to be reset.
    DropQueue(Sender<Option<Box<dyn Queue>>>),
    /// The device has been reset: continue with this queue, or without a device.
    AdoptQueue(Option<Box<dyn Queue>>, InflightPolicy, Sender<()>),
    /// End the thread. All rings have been stopped.
    Quit,
}

#[derive(Default)]
struct Queued {
    commands: Vec<WorkerCommand>,
    closed: bool,
}

/// One worker's command queue.
pub(in crate::engine) struct CommandQueue {
    queued: Mutex<Queued>,
    pending: AtomicBool,
    event: OwnedFd,
}

impl CommandQueue {
    pub(in crate::engine) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queued: Mutex::default(), pending: AtomicBool::new(false), event })
    }

    /// Queues the command that `command` builds around the reply channel. If the worker is gone, the receiver is
    /// disconnected.
    pub(in crate::engine) fn post<T>(&self, command: impl FnOnce(Sender<T>) -> WorkerCommand) -> Receiver<T> {
        let (sender, receiver) = channel();
        self.push(command(sender));
        receiver
    }

    /// Queues a command that has no reply.
    pub(in crate::engine) fn push(&self, command: WorkerCommand) {
        let mut queued = self.queued.lock().unwrap_or_else(PoisonError::into_inner);
        if queued.closed {
            return; // dropping the command closes its reply channel, which tells the waiting sender
        }
        queued.commands.push(command);
        self.pending.store(true, Ordering::Release);
        signal(&self.event);
    }

    /// True if there are commands. A relaxed load is enough, because [`Self::take`] locks the list.
    #[inline]
    pub(in crate::engine) fn has_commands(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// Takes all commands, oldest first.
    pub(in crate::engine) fn take(&self) -> Vec<WorkerCommand> {
        let mut queued = self.queued.lock().unwrap_or_else(PoisonError::into_inner);
        drain(&self.event);
        self.pending.store(false, Ordering::Relaxed);
        std::mem::take(&mut queued.commands)
    }

    /// Drops all commands, future ones included.
    pub(in crate::engine) fn close(&self) {
        let mut queued = self.queued.lock().unwrap_or_else(PoisonError::into_inner);
        queued.closed = true;
        queued.commands.clear();
    }

    /// Readable while there are commands.
    pub(in crate::engine) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
