//! A fake device: a disk in memory that implements the engine's traits. It moves data between a `Vec` and the mapped memory.
//! The test decides when and in which order commands complete, and can lose commands or make recovery fail.

mod options;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::MmapRegion;

use crate::addr::{Address, Iova, Span};
use crate::driver::{
    Blocks, Command, CommandId, Completion, DiskState, Driver, Extent, Full, Geometry, Outcome, OverdueCommands, Queue,
};
use crate::hardware::{AddressSpace, DmaBuffer, MapError};
use crate::memory::Region;
use crate::sys::SharedMemory;
pub(super) use options::DiskOptions;

/// A command as the device received it.
#[derive(Clone, Debug)]
pub(super) struct DiskCommand {
    pub(super) queue: usize,
    pub(super) command: Command,
    data: Vec<Span<Iova>>,
    pub(super) ranges: Vec<Blocks>,
    tag: u32,
}

#[derive(Default)]
struct State {
    medium: Vec<u8>,
    memory: Vec<(Span<Iova>, SharedMemory)>,
    next_iova: u64,
    /// Commands that have been rung and not completed.
    held: Vec<DiskCommand>,
    done: Vec<VecDeque<Completion>>,
    events: Vec<Option<Arc<OwnedFd>>>,
    hold: bool,
    outcome: Option<Outcome>,
    live_queues: usize,
    recovery_fails: bool,
    cache_switches: Vec<bool>,
    recoveries: usize,
    quiesced: usize,
    shut_down: bool,
    most_in_flight: usize,
    doorbells: usize,
}

/// The fake disk. Clones share its state.
#[derive(Clone)]
pub(super) struct FakeDisk {
    state: Arc<Mutex<State>>,
    options: Arc<DiskOptions>,
    geometries: Arc<[Geometry]>,
}

impl FakeDisk {
    pub(super) fn new(options: DiskOptions) -> Self {
        let geometry = &options.geometry;
        let medium = vec![0; geometry.blocks as usize * geometry.block_size as usize];
        let state = State { medium, next_iova: 1 << 44, ..State::default() };
        let geometries = vec![geometry.clone(); options.disks].into();
        Self { state: Arc::new(Mutex::new(state)), options: Arc::new(options), geometries }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Holds commands from now on until [`Self::complete`].
    pub(super) fn hold(&self) {
        self.state().hold = true;
    }

    /// Completes the held commands now, and later ones when they are rung.
    pub(super) fn resume(&self) {
        self.state().hold = false;
        (0..self.held().len()).for_each(|_| self.complete(0));
    }

    /// The held commands.
    pub(super) fn held(&self) -> Vec<DiskCommand> {
        self.state().held.clone()
    }

    /// Executes the held command at `index` and completes it.
    pub(super) fn complete(&self, index: usize) {
        let mut state = self.state();
        let entry = state.held.remove(index);
        state.execute(&entry, self.options.geometry.block_size as usize);
    }

    /// Sets the outcome of all commands from now on.
    pub(super) fn set_outcome(&self, outcome: Outcome) {
        self.state().outcome = Some(outcome);
    }

    /// Makes every recovery fail from now on.
    pub(super) fn fail_recovery(&self) {
        self.state().recovery_fails = true;
    }

    pub(super) fn recoveries(&self) -> usize {
        self.state().recoveries
    }

    pub(super) fn quiesced(&self) -> usize {
        self.state().quiesced
    }

    pub(super) fn is_shut_down(&self) -> bool {
        self.state().shut_down
    }

    pub(super) fn most_in_flight(&self) -> usize {
        self.state().most_in_flight
    }

    pub(super) fn cache_switches(&self) -> Vec<bool> {
        self.state().cache_switches.clone()
    }

    pub(super) fn doorbells(&self) -> usize {
        self.state().doorbells
    }

    pub(super) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        self.state().medium[offset..offset + len].to_vec()
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.state().medium[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn queue(&self, number: usize) -> Box<dyn Queue> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let mut state = self.state();
        state.live_queues += 1;
        state.events[number] = Some(Arc::clone(&event));
        Box::new(FakeDiskQueue { disk: self.clone(), number, event, new: Vec::new(), in_flight: 0 })
    }

    fn queues(&self) -> Vec<Box<dyn Queue>> {
        let count = self.options.queues;
        let mut state = self.state();
        state.done = vec![VecDeque::new(); count];
        state.events = vec![None; count];
        drop(state);
        (0..count).map(|n| self.queue(n)).collect()
    }
}

impl State {
    fn execute(&mut self, entry: &DiskCommand, block_size: usize) {
        let outcome = self.outcome.unwrap_or(Outcome::Success);
        if outcome == Outcome::Success {
            match entry.command {
                Command::Read { block, count } => {
                    self.transfer(entry, block as usize, count as usize, block_size, true)
                }
                Command::Write { block, count } => {
                    self.transfer(entry, block as usize, count as usize, block_size, false);
                }
                Command::WriteZeroes { block, count, .. } => {
                    self.medium[block as usize * block_size..][..count as usize * block_size].fill(0);
                }
                // This disk has no zones: it only takes the commands.
                Command::ZoneAppend { .. } | Command::ZoneReport { .. } | Command::ManageZone { .. } => {}
                // Fill discarded blocks with 0xdd.
                Command::Flush => {
                    for range in &entry.ranges {
                        let start = range.first as usize * block_size;
                        self.medium[start..start + range.count as usize * block_size].fill(0xdd);
                    }
                }
            }
        }
        self.done[entry.queue].push_back(Completion { tag: entry.tag, outcome, result: 0 });
        if let Some(event) = &self.events[entry.queue] {
            rustix::io::write(&**event, &1_u64.to_ne_bytes()).unwrap();
        }
    }

    fn transfer(&mut self, entry: &DiskCommand, block: usize, count: usize, block_size: usize, read: bool) {
        let (mut at, end) = (block * block_size, (block + count) * block_size);
        for span in &entry.data {
            for byte in 0..span.len() {
                let address = span.start().checked_add(byte).unwrap();
                let found = self.memory.iter().find(|(mapped, _)| mapped.contains(address));
                let (mapped, shared) = found.unwrap_or_else(|| panic!("DMA to unmapped {address}"));
                let offset = mapped.offset_of(address).unwrap() as usize;
                if read {
                    shared.write_u8(offset, self.medium[at]);
                } else {
                    self.medium[at] = shared.read_u8(offset);
                }
                at += 1;
            }
        }
        assert_eq!(at, end, "a command transfers all of its buffers");
    }
}

impl AddressSpace for FakeDisk {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.state().memory.push((region.iova(), region.memory().clone()));
        Ok(())
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.state().memory.retain(|(span, _)| *span != region.iova());
        Ok(())
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(bytes).unwrap()));
        let mut state = self.state();
        let span = Span::new(Iova(state.next_iova), bytes as u64).unwrap();
        state.next_iova += bytes as u64;
        state.memory.push((span, shared.clone()));
        Ok(DmaBuffer::new(shared, span, Box::new(())))
    }
}

impl Driver for FakeDisk {
    fn geometries(&self) -> &[Geometry] {
        &self.geometries
    }

    fn take_queues(&mut self) -> Vec<Box<dyn Queue>> {
        self.queues()
    }

    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>> {
        {
            let mut state = self.state();
            assert_eq!(state.live_queues, 0, "all former queues have been dropped");
            state.recoveries += 1;
            state.held.clear();
            anyhow::ensure!(!state.recovery_fails, "the controller does not become ready");
        }
        Ok(self.queues())
    }

    fn check(&self) -> anyhow::Result<()> {
        Ok(())
    }

    fn abort(&mut self, _: &[CommandId]) -> anyhow::Result<()> {
        Ok(())
    }

    fn removal_request(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn release(&mut self) {
        self.shut_down();
    }

    fn disk_state(&self) -> Option<DiskState> {
        let Geometry { serial, block_size, .. } = self.options.geometry.clone();
        let identifiers = ([0; 16], [0; 8]);
        Some(DiskState { serial, namespace: 1, identifiers, block_size, zone_blocks: 0, write_cache: None })
    }

    fn quiesce(&mut self) -> anyhow::Result<()> {
        let mut state = self.state();
        assert_eq!(state.live_queues, 0, "all queues have been dropped");
        anyhow::ensure!(!state.recovery_fails, "the controller does not stop");
        state.held.clear();
        state.quiesced += 1;
        Ok(())
    }

    fn set_write_cache(&mut self, on: bool) -> anyhow::Result<()> {
        self.state().cache_switches.push(on);
        Ok(())
    }

    fn shut_down(&mut self) {
        let mut state = self.state();
        assert_eq!(state.live_queues, 0, "all queues have been dropped");
        state.held.clear(); // a controller that is disabled executes nothing
        state.shut_down = true;
    }
}

struct FakeDiskQueue {
    disk: FakeDisk,
    number: usize,
    event: Arc<OwnedFd>,
    new: Vec<DiskCommand>,
    in_flight: usize,
}

impl Drop for FakeDiskQueue {
    fn drop(&mut self) {
        self.disk.state().live_queues -= 1;
    }
}

/// The parts of `buffers` from `position` on, `bytes` bytes in all.
fn cut(buffers: &[Span<Iova>], mut position: u64, mut bytes: u64) -> Vec<Span<Iova>> {
    let mut pieces = Vec::new();
    for span in buffers {
        if position >= span.len() {
            position -= span.len();
            continue;
        }
        let len = bytes.min(span.len() - position);
        pieces.extend(span.slice(position, len));
        position = 0;
        bytes -= len;
    }
    pieces
}

impl Queue for FakeDiskQueue {
    fn disk(&self) -> usize {
        self.number * self.disk.options.disks / self.disk.options.queues
    }
    fn extent(&self, buffers: &[Span<Iova>], position: u64, bounce_limit: u32) -> Extent {
        let total: u64 = buffers.iter().map(Span::len).sum();
        let options = &self.disk.options;
        let block = options.geometry.block_size;
        let most = u32::try_from(total - position).unwrap_or(u32::MAX / block * block).min(options.max_transfer);
        let aligned = |span: &Span<Iova>| {
            span.start().is_aligned(options.alignment) && span.len().is_multiple_of(options.alignment)
        };
        let direct = cut(buffers, position, u64::from(most)).iter().all(aligned);
        Extent { bytes: if direct { most } else { most.min(bounce_limit) }, direct, listed: false }
    }

    fn submit(
        &mut self,
        command: Command,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u32,
        tag: u32,
    ) -> Result<(), Full> {
        if self.in_flight == self.disk.options.depth {
            return Err(Full);
        }
        self.in_flight += 1;
        let mut state = self.disk.state();
        state.most_in_flight = state.most_in_flight.max(self.in_flight);
        let data = cut(buffers, position, u64::from(bytes));
        self.new.push(DiskCommand { queue: self.number, command, data, ranges: Vec::new(), tag });
        Ok(())
    }

    fn discard(&mut self, ranges: &[Blocks], tag: u32) -> Result<(), Full> {
        let limits = self.disk.options.geometry.discard.unwrap();
        let blocks: u64 = ranges.iter().map(|range| u64::from(range.count)).sum();
        assert!((1..=usize::from(limits.ranges)).contains(&ranges.len()) && blocks <= limits.blocks);
        assert!(ranges.iter().all(|range| (1..=limits.range_blocks).contains(&range.count)));
        self.submit(Command::Flush, &[], 0, 0, tag)?;
        self.new.last_mut().unwrap().ranges = ranges.to_vec();
        Ok(())
    }

    fn ring(&mut self) {
        let mut state = self.disk.state();
        state.doorbells += 1;
        for entry in self.new.drain(..) {
            if state.hold {
                state.held.push(entry);
            } else {
                state.execute(&entry, self.disk.options.geometry.block_size as usize);
            }
        }
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        let finished = std::mem::take(&mut self.disk.state().done[self.number]);
        for completion in finished {
            self.in_flight -= 1;
            done(completion);
        }
    }

    fn tick(&mut self, _: u32) -> OverdueCommands {
        OverdueCommands::default()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    fn set_interrupt_wanted(&self, _: bool) {}
}
