//! How the control thread speaks to a worker: a list of orders, a flag that a busy worker reads for nearly nothing once per
//! pass, and an eventfd that wakes a sleeping one. Every order carries the way its answer goes back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::keeper::Orphans;
use super::ring::{drain, signal};
use super::{EngineError, RingSetup};
use crate::addr::{Gpa, Span};
use crate::driver::Queue;
use crate::memory::MemTable;

/// Something a worker is told to do. Rings are named by their seat with the worker.
pub(super) enum Order {
    Start(usize, Box<RingSetup>, Sender<Result<(), EngineError>>),
    /// Answered when the last request taken from the ring is in the used ring.
    Stop(usize, Sender<Option<u32>>),
    Enable(usize, bool, Sender<()>),
    Call(usize, Option<OwnedFd>, Sender<()>),
    Err(usize, Option<OwnedFd>, Sender<()>),
    Kick(usize, Option<OwnedFd>, Sender<()>),
    Publish(Arc<MemTable>, Sender<()>),
    /// Answered when no request in flight touches the spans.
    Withdraw(Arc<MemTable>, Arc<[Span<Gpa>]>, Sender<()>),
    /// Answered when everything completed so far is durable; false if the device could not do that.
    Flush(Sender<bool>),
    /// Submit nothing from now on. Answered when the device has nothing in flight.
    Rest(Sender<()>),
    /// Submit again.
    Go,
    /// Drop the device queue; the device is about to be reset.
    HandBack(Sender<()>),
    /// The device has been reset: go on with this queue, or without a device.
    Adopt(Option<Box<dyn Queue>>, Orphans, Sender<()>),
    /// End the thread. All rings have been stopped.
    Quit,
}

#[derive(Default)]
struct Inbox {
    orders: Vec<Order>,
    closed: bool,
}

/// One worker's mailbox.
pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
    pending: AtomicBool,
    event: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { inbox: Mutex::default(), pending: AtomicBool::new(false), event })
    }

    /// Leaves the order that `order` makes around the way back. If the worker is gone, the receiver says so.
    pub(super) fn post<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Receiver<T> {
        let (sender, receiver) = channel();
        self.leave(order(sender));
        receiver
    }

    /// Leaves an order.
    pub(super) fn leave(&self, order: Order) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if inbox.closed {
            return; // dropping the order hangs up on whoever waits for its answer
        }
        inbox.orders.push(order);
        self.pending.store(true, Ordering::Release);
        signal(&self.event);
    }

    /// True if there are orders. The flag alone hands nothing over; [`Self::take`] does that under the lock.
    #[inline]
    pub(super) fn has_orders(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// Takes all orders, in order.
    pub(super) fn take(&self) -> Vec<Order> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        drain(&self.event);
        self.pending.store(false, Ordering::Relaxed);
        std::mem::take(&mut inbox.orders)
    }

    /// Refuses all orders from now on, and those not yet taken.
    pub(super) fn close(&self) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.closed = true;
        inbox.orders.clear();
    }

    /// Readable while there are orders.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
