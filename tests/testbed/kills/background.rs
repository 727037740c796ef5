//! The load of a virtual machine that must not notice anything, on a thread of its own.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::{Error, Guest, Region, Shape};
use crate::oracle::Oracle;

use super::BLOCKS;
use super::load::Load;

/// Time without any completion after which a request counts as lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is done to the guest between two steps of its load.
pub(super) type Order = Box<dyn FnOnce(&mut Guest) -> Result<(), Error> + Send>;

/// A running load. The disk must have been empty at its start.
pub struct Background {
    stop: Arc<AtomicBool>,
    completions: Arc<AtomicU64>,
    orders: Sender<Order>,
    thread: JoinHandle<Result<Duration, Error>>,
}

impl Background {
    /// Bytes of the disk that it needs.
    pub const DISK: u64 = BLOCKS * crate::oracle::BLOCK as u64;

    /// Starts it over a connected socket.
    ///
    /// # Errors
    /// The session cannot be set up.
    pub fn start(socket: UnixStream, shape: Shape, region: Region, seed: u64) -> Result<Self, Error> {
        let mut guest = Guest::new(shape, region)?;
        guest.connect(socket)?;
        let (stop, completions) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&completions));
        let (orders, received): (_, Receiver<Order>) = channel();
        let thread = std::thread::spawn(move || {
            let mut oracle = Oracle::new(BLOCKS, seed);
            let mut load = Load::new(&mut guest, &mut oracle, PATIENCE);
            load.run_until_stopped(&stopped, &counted, &received)?;
            let gap = load.longest_gap();
            load.finish()?;
            Ok(gap)
        });
        Ok(Self { stop, completions, orders, thread })
    }

    /// Waits until `count` more requests have completed, or the load has failed.
    pub fn progresses(&self, count: u64) {
        let (from, start) = (self.completions.load(Relaxed), Instant::now());
        while self.completions.load(Relaxed) < from + count && !self.thread.is_finished() && start.elapsed() < PATIENCE
        {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Does something to the guest while its load runs, and waits for that. False if the load has failed; [`Self::finish`] says why.
    pub fn act(&self, act: impl FnOnce(&mut Guest) -> Result<(), Error> + Send + 'static) -> bool {
        let (done, waits) = channel();
        let order: Order = Box::new(move |guest| {
            let result = act(guest);
            drop(done);
            result
        });
        // Neither side answers: the end of the channel is the answer.
        self.orders.send(order).is_ok_and(|()| waits.recv() == Err::<(), _>(std::sync::mpsc::RecvError))
            && !self.is_over()
    }

    /// True if it has failed; [`Self::finish`] says why.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it, waits for the requests in flight, and reads the whole disk. Returns the longest time between two completions.
    ///
    /// # Errors
    /// What was lost, doubled or reordered, or that the server has disconnected.
    pub fn finish(self) -> Result<Duration, Error> {
        self.stop.store(true, Relaxed);
        self.thread.join().map_err(|_| "the load panicked")?
    }
}
