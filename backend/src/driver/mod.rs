//! The devices, each in its own language. The engine knows a device only through the two traits here: [`Driver`] brings
//! the device up and down, [`Queue`] is one worker's private path to it.
//!
//! A worker owns its queue, so nothing here takes a lock. Addresses are the device's own ([`Iova`]); a driver never sees
//! guest memory.

pub mod nvme;

use std::os::fd::BorrowedFd;

use crate::addr::{Iova, Span};

/// What the disk is, as far as its user can tell. Sizes are in the units named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk, logical blocks.
    pub blocks: u64,
    /// Size of a logical block, bytes: 512 or 4096.
    pub block_size: u32,
    /// Preferred write granularity, bytes; a power-of-two multiple of `block_size`.
    pub physical_block_size: u32,
    /// True if writes are refused (by the operator, or by the device).
    pub read_only: bool,
    /// True if there is a write cache that loses its contents with the power.
    pub volatile_cache: bool,
    /// True if that cache was on when the device was brought up.
    pub cache_on: bool,
    /// Serial number, ASCII without padding, at most 20 bytes.
    pub serial: String,
    /// Model, ASCII without padding.
    pub model: String,
    /// Longest transfer of one command, bytes; 0 where it is not known.
    pub max_transfer: u32,
    /// What [`Queue::discard`] can take; `None` if the device has no such command.
    pub discard: Option<DiscardLimits>,
    /// What [`Command::WriteZeroes`] can take; `None` if the device has no such command.
    pub zeroes: Option<ZeroesLimits>,
}

/// What one discard command can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Most ranges, 1 to 256.
    pub ranges: u16,
    /// Most logical blocks in one of them, at least 1.
    pub range_blocks: u32,
    /// Most logical blocks in all of them, at least `range_blocks`.
    pub blocks: u64,
}

/// What one write-zeroes command can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroesLimits {
    /// Most logical blocks, 1 to 65536.
    pub blocks: u32,
    /// True if the blocks may be deallocated by it, and read as zeroes all the same.
    pub deallocates: bool,
}

/// A range of logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// First logical block.
    pub first: u64,
    /// How many, at least 1.
    pub count: u32,
}

/// One command to the device, in logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// From the medium to memory.
    Read {
        /// First logical block.
        block: u64,
        /// How many, at least 1.
        count: u32,
    },
    /// From memory to the medium.
    Write {
        /// First logical block.
        block: u64,
        /// How many, at least 1.
        count: u32,
    },
    /// The blocks read as zeroes afterwards; no data is moved.
    WriteZeroes {
        /// First logical block.
        block: u64,
        /// How many, at least 1.
        count: u32,
        /// True if the device may deallocate them.
        deallocate: bool,
    },
    /// Everything completed so far becomes durable.
    Flush,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Success,
    /// The device does not know or does not allow the command.
    Unsupported,
    /// Anything else.
    Failed,
}

/// A finished command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`Queue::submit`] was given.
    pub tag: u32,
    /// How it ended.
    pub outcome: Outcome,
}

/// How much of a list of buffers one command can take, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the given position on; a multiple of the logical block, at least one.
    pub bytes: u32,
    /// True if the device reaches these bytes where they are; false if they must be copied through a bounce buffer
    /// (contiguous, aligned to the device's page).
    pub direct: bool,
    /// True if it needs a list of buffers of any alignment for that, where it would rather have whole pages.
    pub listed: bool,
}

/// The device's name for a command in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandId {
    /// Which queue.
    pub queue: u16,
    /// Which command of it.
    pub command: u16,
}

/// What of a queue, or of several, takes longer than it should.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverdueCommands {
    /// Something has been in flight for a whole beat.
    pub stalled: bool,
    /// What has been in flight for too long since the last beat.
    pub expired: Vec<CommandId>,
    /// Something was overdue long ago and still is.
    pub stuck: bool,
}

impl OverdueCommands {
    /// Adds what another queue has found.
    pub fn merge(&mut self, other: Self) {
        self.stalled |= other.stalled;
        self.stuck |= other.stuck;
        self.expired.extend(other.expired);
    }
}

/// The queue is full; try again after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// One worker's path to the device. All methods are called by that worker alone.
///
/// `submit` puts commands into memory, `ring` tells the device. Between the two is the place where a non-coherent device
/// needs its flush, and any number of commands share one `ring`.
pub trait Queue: Send {
    /// How many bytes of `buffers`, from `position` bytes on, the next command can take. `buffers` hold a whole number of
    /// logical blocks in total; `position` lies inside. Bounced extents never exceed `bounce_limit` bytes.
    fn extent(&self, buffers: &[Span<Iova>], position: u64, bounce_limit: u32) -> Extent;
    /// Queues `command` for `bytes` bytes of `buffers` from `position` on (both 0 for a command without data); `tag` comes
    /// back in its [`Completion`].
    ///
    /// # Errors
    /// [`Full`] when no entry is free; nothing has been queued.
    fn submit(
        &mut self,
        command: Command,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u32,
        tag: u32,
    ) -> Result<(), Full>;
    /// Queues one command that tells the device that nobody needs the contents of `ranges` any more, within the limits of
    /// [`Geometry::discard`].
    ///
    /// # Errors
    /// [`Full`] as for [`Self::submit`].
    fn discard(&mut self, ranges: &[Blocks], tag: u32) -> Result<(), Full>;
    /// Makes everything submitted so far visible to the device; does nothing if there is nothing new.
    fn ring(&mut self);
    /// Takes every finished command off the queue and hands it to `done`.
    fn reap(&mut self, done: &mut dyn FnMut(Completion));
    /// Marks the end of a beat, one of equal intervals; a command is overdue after `limit` of them, and stuck after another
    /// quarter as many.
    fn tick(&mut self, limit: u32) -> OverdueCommands;
    /// Commands submitted and not yet reaped.
    fn in_flight(&self) -> usize;
    /// Signalled by the device when a command has finished.
    fn event(&self) -> BorrowedFd<'_>;
    /// Says whether the worker is about to wait for the event, or looks by itself. A command that finished while nobody
    /// waited may not be signalled, so the worker looks once more before the wait.
    fn set_interrupt_wanted(&self, interrupt_wanted: bool);
}

/// A device that has been brought up.
pub trait Driver: Send {
    /// What it is.
    fn geometry(&self) -> &Geometry;
    /// Hands out the queues, one per worker; the second call gives none.
    fn take_queues(&mut self) -> Vec<Box<dyn Queue>>;
    /// Stops all DMA by resetting the device, and brings it up again with fresh queues, whose number is as before. Used
    /// when commands do not come back, and again at intervals if that has failed or the device has been released; then it
    /// is taken again. The disk may have another size then. All former queues must have been dropped.
    ///
    /// # Errors
    /// What kept the device from coming back; it does no DMA then.
    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>>;
    /// True while the device has been released and not been taken again; then [`Self::recover`] is cheap to try.
    fn is_released(&self) -> bool {
        false
    }
    /// Looks whether the device is there and alive.
    ///
    /// # Errors
    /// What is wrong with it; then [`Self::recover`] is called for.
    fn check(&self) -> anyhow::Result<()>;
    /// Asks the device to end commands early. They may end in any way, or not at all.
    ///
    /// # Errors
    /// The device does not answer; then [`Self::recover`] is called for.
    fn abort(&mut self, commands: &[CommandId]) -> anyhow::Result<()>;
    /// Readable when the device may have something to tell, to be answered by [`Self::handle_events`].
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Hears what the device has to tell; [`Self::geometry`] is up to date then.
    ///
    /// # Errors
    /// The device does not answer; then [`Self::recover`] is called for.
    fn handle_events(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    /// Readable when the host wants the device back, to be answered by [`Self::release`].
    fn removal_request(&self) -> Option<BorrowedFd<'_>>;
    /// Stops the device and lets go of it, so that the host can have it. All queues must have been dropped.
    fn release(&mut self);
    /// Turns the volatile write cache on or off; it stays so over [`Self::recover`]. What was written before is not made
    /// durable by turning it off.
    ///
    /// # Errors
    /// The device refuses, or does not answer.
    fn set_write_cache(&mut self, on: bool) -> anyhow::Result<()>;
    /// Tells the device to make its data durable and to stop, as before a power-off. All queues must have been dropped.
    fn shut_down(&mut self);
}
