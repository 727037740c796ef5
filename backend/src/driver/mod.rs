//! Device drivers. The engine knows a device only through the two traits here: [`Driver`] controls the device as a whole,
//! [`Queue`] is one worker's private path to it.
//!
//! Each worker owns its queue, so nothing here takes a lock. Drivers handle device addresses ([`Iova`]) only and never
//! access guest memory.

mod health;
pub mod nvme;
pub mod zones;

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

pub use health::{Health, Identification};

use crate::addr::{Iova, Span};
use crate::hardware::LeftToSuccessor;
pub use zones::{Zone, ZoneAction, ZoneFault, ZoneGeometry, ZoneState};

/// The properties of the disk that its user can see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk, logical blocks.
    pub blocks: u64,
    /// Size of a logical block, bytes: 512 or 4096.
    pub block_size: u32,
    /// Preferred write granularity, bytes; a power-of-two multiple of `block_size`.
    pub physical_block_size: u32,
    /// How far the first physical block is from the start of the disk, bytes; whole blocks, less than a physical block.
    pub alignment_offset: u32,
    /// Optimal write size, bytes; 0 if unknown.
    pub optimal_size: u32,
    /// A transfer that crosses a multiple of this many logical blocks is slow; 0 if there is none.
    pub boundary: u32,
    /// True if writes are refused, by configuration or by the device.
    pub read_only: bool,
    /// True if the device has a write cache that loses its contents on power loss.
    pub volatile_cache: bool,
    /// True if that cache was enabled when the device was brought up.
    pub cache_on: bool,
    /// Serial number, ASCII without padding, at most 20 bytes.
    pub serial: String,
    /// Model, ASCII without padding.
    pub model: String,
    /// Longest transfer of one command, bytes; 0 if unknown.
    pub max_transfer: u32,
    /// Limits of [`Queue::discard`]; `None` if the device has no such command.
    pub discard: Option<DiscardLimits>,
    /// Limits of [`Command::WriteZeroes`]; `None` if the device has no such command.
    pub zeroes: Option<ZeroesLimits>,
    /// The zones, which must be written sequentially; `None` for an ordinary disk.
    pub zones: Option<ZoneGeometry>,
}

/// Limits of one discard command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Most ranges, 1 to 256.
    pub ranges: u16,
    /// Most logical blocks in one range, at least 1.
    pub range_blocks: u32,
    /// Most logical blocks in all ranges together, at least `range_blocks`.
    pub blocks: u64,
}

/// Limits of one write-zeroes command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroesLimits {
    /// Most logical blocks, 1 to 65536.
    pub blocks: u32,
    /// True if the command can deallocate the blocks and they still read as zeroes.
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

/// A command to the device, in logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Transfers data from the medium to memory.
    Read {
        /// First logical block.
        block: u64,
        /// How many, at least 1.
        count: u32,
    },
    /// Transfers data from memory to the medium.
    Write {
        /// First logical block.
        block: u64,
        /// How many, at least 1.
        count: u32,
    },
    /// Makes the blocks read as zeroes, without a data transfer.
    WriteZeroes {
        /// First logical block.
        block: u64,
        /// How many, at least 1.
        count: u32,
        /// True if the device may deallocate them.
        deallocate: bool,
    },
    /// Makes all writes completed so far durable.
    Flush,
    /// Transfers data from memory to a zone, at its write pointer. [`Completion::result`] is the first block.
    ZoneAppend {
        /// First logical block of the zone.
        block: u64,
        /// How many, at least 1.
        count: u32,
    },
    /// Transfers a report of the zones from this one on to memory; [`zones::zones`] decodes it.
    ZoneReport {
        /// First logical block of a zone.
        block: u64,
    },
    /// Changes the state of a zone.
    ManageZone {
        /// First logical block of the zone.
        block: u64,
        /// The change.
        action: ZoneAction,
    },
}

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the medium to memory.
    Read,
    /// From memory to the medium.
    Write,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command succeeded.
    Success,
    /// The device does not support the command or one of its fields.
    Unsupported,
    /// Any other error.
    Failed,
    /// The rules of the zone do not allow it.
    Zone(ZoneFault),
}

/// A finished command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The tag given to [`Queue::submit`] or [`Queue::discard`].
    pub tag: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// First logical block of the data of a [`Command::ZoneAppend`], according to the device. No meaning for other commands.
    pub result: u64,
}

/// The disk as its user has come to know it: what a successor that takes the device over must find and keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Serial number, ASCII without padding.
    pub serial: String,
    /// Namespace identifier.
    pub namespace: u32,
    /// NGUID and EUI64, each zero if the namespace has none.
    pub identifiers: ([u8; 16], [u8; 8]),
    /// Size of a logical block, bytes.
    pub block_size: u32,
    /// Size of a zone, logical blocks; 0 without zones.
    #[serde(default)]
    pub zone_blocks: u64,
    /// The last setting made by [`Driver::set_write_cache`], if any.
    pub write_cache: Option<bool>,
}

/// How many bytes of a buffer list one command can transfer, and by which method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the given position on: one or more whole logical blocks.
    pub bytes: u32,
    /// True if the device accesses these bytes in place; false if they must be copied through a bounce buffer, which is
    /// contiguous and aligned to the device's page.
    pub direct: bool,
    /// True if in-place access needs a scatter-gather list, because whole pages (PRPs) cannot describe the buffers.
    pub listed: bool,
}

/// Identifies a command in flight to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandId {
    /// Queue identifier.
    pub queue: u16,
    /// Command identifier within the queue.
    pub command: u16,
}

/// The commands of one or more queues that take longer than they should.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverdueCommands {
    /// A command has been in flight for at least one whole tick.
    pub stalled: bool,
    /// Commands that exceeded the time limit since the previous tick.
    pub expired: Vec<CommandId>,
    /// A command is still in flight although it expired and an abort had time to act.
    pub stuck: bool,
}

impl OverdueCommands {
    /// Adds the findings of another queue.
    pub fn merge(&mut self, other: Self) {
        self.stalled |= other.stalled;
        self.stuck |= other.stuck;
        self.expired.extend(other.expired);
    }
}

/// The queue is full. A completion frees an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// One worker's path to the device. Only that worker calls its methods.
///
/// `submit` writes commands to memory and `ring` notifies the device. Data that a non-coherent device accesses is flushed
/// between the two. Any number of commands share one `ring`.
pub trait Queue: Send {
    /// The number of the disk whose blocks the commands mean.
    fn disk(&self) -> usize {
        0
    }
    /// How many bytes of `buffers`, starting `position` bytes in, the next command can transfer. The total length of
    /// `buffers` is a whole number of logical blocks, and `position` lies inside. A bounced extent has at most
    /// `bounce_limit` bytes.
    fn extent(&self, buffers: &[Span<Iova>], position: u64, bounce_limit: u32) -> Extent;
    /// Queues `command` for `bytes` bytes of `buffers` from `position` on (both 0 for a command without data). Its
    /// [`Completion`] returns `tag`.
    ///
    /// # Errors
    /// [`Full`] if no entry is free; nothing was queued.
    fn submit(
        &mut self,
        command: Command,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u32,
        tag: u32,
    ) -> Result<(), Full>;
    /// Queues a transfer between the blocks from `block` on and all of `buffer`, if that is short enough for a command without
    /// a list. Returns false without effect if it is not, or if no entry is free: [`Self::extent`] and [`Self::submit`] then
    /// say what can be done.
    fn submit_short(&mut self, _direction: Direction, _block: u64, _buffer: Span<Iova>, _tag: u32) -> bool {
        false
    }
    /// Queues one command that discards the contents of `ranges`, which must respect [`Geometry::discard`].
    ///
    /// # Errors
    /// [`Full`] as for [`Self::submit`].
    fn discard(&mut self, ranges: &[Blocks], tag: u32) -> Result<(), Full>;
    /// Notifies the device of all commands submitted since the last call; does nothing if there are none.
    fn ring(&mut self);
    /// Removes the finished commands from the queue and passes each to `done`.
    fn reap(&mut self, done: &mut dyn FnMut(Completion));
    /// As [`Self::reap`], but without a call for each: the first so many of `batch` are the completions. What follows them has no
    /// meaning, and is left there because to write it again would take time.
    fn reap_batch(&mut self, batch: &mut Vec<Completion>) -> usize {
        batch.clear();
        self.reap(&mut |completion| batch.push(completion));
        batch.len()
    }
    /// Advances the clock of the command time-outs; called at equal intervals. A command expires `limit` ticks after it
    /// was submitted, and is stuck another `limit / 4` ticks later.
    fn tick(&mut self, limit: u32) -> OverdueCommands;
    /// Number of commands submitted and not yet reaped.
    fn in_flight(&self) -> usize;
    /// The eventfd that the device signals when a command has finished.
    fn event(&self) -> BorrowedFd<'_>;
    /// True if the device never signals [`Self::event`]: while commands are in flight, the worker has to reap at intervals.
    fn is_polled(&self) -> bool {
        false
    }
    /// Sets whether the worker waits for [`Self::event`] or polls. The device may skip the signal for a command that
    /// finishes while this is false, so after setting it to true the worker must reap once more before it waits.
    fn set_interrupt_wanted(&self, interrupt_wanted: bool);
}

/// A device that has been brought up. It has one or more disks, numbered from 0.
pub trait Driver: Send {
    /// The disks' current properties; at least one.
    fn geometries(&self) -> &[Geometry];
    /// The properties of the first disk.
    fn geometry(&self) -> &Geometry {
        &self.geometries()[0]
    }
    /// Moves the queues out, one per worker; a second call returns none. Each serves one disk, [`Queue::disk`].
    fn take_queues(&mut self) -> Vec<Box<dyn Queue>>;
    /// Stops all DMA by resetting the device, and brings it up again with the same number of new queues, which serve
    /// the same disks in the same order. Called when
    /// commands do not complete, and then at intervals until it succeeds. A released device is reacquired first. A disk
    /// may have a different size afterwards. All former queues must have been dropped.
    ///
    /// # Errors
    /// Why the device could not be brought up. It does no DMA then.
    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>>;
    /// True from [`Self::release`] until the device is reacquired. A failing [`Self::recover`] is cheap in this state.
    fn is_released(&self) -> bool {
        false
    }
    /// Checks that the device is present and working.
    ///
    /// # Errors
    /// What is wrong; the caller should [`Self::recover`].
    fn check(&self) -> anyhow::Result<()>;
    /// Asks the device to abort commands. They may complete with any outcome, or not at all.
    ///
    /// # Errors
    /// The device does not respond; the caller should [`Self::recover`].
    fn abort(&mut self, commands: &[CommandId]) -> anyhow::Result<()>;
    /// Readable when the device may have an asynchronous event; the caller then calls [`Self::handle_events`].
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// True if [`Self::event_fd`] is never signalled, so that [`Self::handle_events`] has to be called at intervals.
    fn is_polled(&self) -> bool {
        false
    }
    /// Handles the device's asynchronous events and updates [`Self::geometry`].
    ///
    /// # Errors
    /// The device does not respond; the caller should [`Self::recover`].
    fn handle_events(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    /// Readable when the host requests the device back; the caller then calls [`Self::release`].
    fn removal_request(&self) -> Option<BorrowedFd<'_>>;
    /// What the device says of itself.
    ///
    /// # Errors
    /// This driver does not know.
    fn identification(&self, _disk: usize) -> anyhow::Result<Identification> {
        anyhow::bail!("this driver does not identify its device")
    }
    /// Asks the device for its health.
    ///
    /// # Errors
    /// It does not tell, or does not respond.
    fn health(&mut self) -> anyhow::Result<Health> {
        anyhow::bail!("this driver does not ask for the device's health")
    }
    /// Stops the device and closes it, so that the host can unbind it. All queues must have been dropped.
    fn release(&mut self);
    /// What a successor must find and keep; `None` if there is no device that could be handed over, or it has several disks.
    fn disk_state(&self) -> Option<DiskState> {
        None
    }
    /// Stops all DMA and all interrupts, so that another process can drive the device, and frees the queues' memory. The device
    /// stays acquired. All queues must have been dropped. [`Self::recover`] brings it up again.
    ///
    /// # Errors
    /// The device cannot be stopped; the caller should [`Self::recover`].
    fn quiesce(&mut self) -> anyhow::Result<()> {
        anyhow::bail!("this driver cannot hand its device over")
    }
    /// After [`Self::quiesce`], and after another process has driven the device and ended: stops the device, in whatever state
    /// it is. The caller then has that process's memory unmapped, and calls [`Self::recover`].
    ///
    /// # Errors
    /// The device cannot be stopped.
    fn resume(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    /// Ends the driver after [`Self::quiesce`], without any access to the device: another process drives it.
    fn leave(self: Box<Self>, _left: &LeftToSuccessor) {}
    /// Turns the volatile write cache of all disks on or off; [`Self::recover`] keeps the setting. Turning it off does not make
    /// earlier writes durable.
    ///
    /// # Errors
    /// The device refuses, or does not respond.
    fn set_write_cache(&mut self, on: bool) -> anyhow::Result<()>;
    /// Makes the data durable and stops the device, as before a power-off. All queues must have been dropped.
    fn shut_down(&mut self);
}
