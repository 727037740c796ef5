//! The split virtqueue, device side (virtio 1.2 §2.7). The three areas are looked up once, when the ring starts. Each word of
//! shared memory is read once.
//!
//! ```text
//!   published ≤ next_used              used entries visible to the driver, used entries written
//!   next_avail ≤ avail.idx             chains taken, chains made available; at most `size` apart
//! ```

use std::sync::atomic::{Ordering, fence};

use super::areas::map_areas;
use super::chain::{Chain, Head, WalkLimits};
use super::descriptor::Descriptor;
use super::fast_path::{FastDescriptor, FastRequest, FastRing};
use super::layout::{MAX_SIZE, RingFault};
use crate::engine::dirty_log::RingLog;
use crate::engine::error::EngineError;
use crate::engine::guest_memory::{BatchView, GuestMemoryView};
use crate::engine::inflight_region::split::SplitMarks;
use crate::engine::inflight_region::split_recovery::SplitState;
use crate::engine::inflight_region::{Contradiction, InflightRegion, Tracking};
use crate::engine::setup::VringSetup;
use crate::memory::MemTable;
use crate::sys::{Line, SharedArray, SharedMemory, SharedRing};

/// VIRTQ_AVAIL_F_NO_INTERRUPT, virtio 1.2 §2.7.6.
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY, virtio 1.2 §2.7.8.
const USED_F_NO_NOTIFY: u16 = 1;
/// `idx` follows `flags` in both rings, virtio 1.2 §2.7.6 and §2.7.8.
const IDX: usize = 2;
/// The entries follow `idx`; used_event or avail_event follows the entries.
const RING: usize = 4;

/// One running split virtqueue.
pub struct SplitRing {
    desc: SharedArray<SharedMemory, u64, 2>,
    avail: SharedMemory,
    avail_ring: SharedRing<u16, 1>,
    used: SharedMemory,
    used_ring: SharedRing<u32, 2>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    next_used: u16,
    published: u16,
    /// used.idx at the last decision about a notification. `None` until the first.
    signalled_used: Option<u16>,
    marks: Option<SplitMarks>,
    log: Option<RingLog>,
    /// The heads of requests to submit again, the first one last.
    recovered: Vec<u16>,
    /// By head, where the last indirect table there was. A driver that has few requests in flight often puts the next one there.
    tables: Box<[Line]>,
}

impl SplitRing {
    /// Finds the three areas in `table`. The used index continues from used.idx in memory.
    ///
    /// # Errors
    /// [`EngineError::RingArea`] or [`EngineError::RingBase`].
    pub fn new(setup: &VringSetup, table: &MemTable) -> Result<Self, EngineError> {
        let VringSetup { index, size, base, .. } = *setup;
        let [desc, avail, used] = map_areas(setup, table)?;
        let next_avail = u16::try_from(base).map_err(|_| EngineError::RingBase { index, size, base })?;
        let next_used = used.read_u16(IDX);
        let entries = usize::from(size);
        let aligned = "`map_areas` has checked size and alignment";
        Ok(Self {
            desc: desc.array(0, entries).expect(aligned).into_owned(),
            avail_ring: avail.array(RING, entries).and_then(SharedArray::into_ring).expect(aligned),
            avail,
            used_ring: used.array(RING, entries).and_then(SharedArray::into_ring).expect(aligned),
            used,
            size,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            next_avail,
            next_used,
            published: next_used,
            signalled_used: None,
            marks: None,
            log: None,
            recovered: Vec::new(),
            tables: vec![Line::default(); entries].into(),
        })
    }

    /// Records the requests in flight in `region` from now on, and finds those of the process before. The ring has just been
    /// created.
    ///
    /// # Errors
    /// The record is not believed. Nothing has changed.
    pub fn track(&mut self, region: &InflightRegion) -> Result<Tracking, Contradiction> {
        let avail_idx = self.avail.load_acquire_u16(IDX);
        let state = SplitState { size: self.size, used_idx: self.next_used, avail_idx, base: self.next_avail };
        let Some((marks, plan)) = SplitMarks::start(region, &state)? else { return Ok(Tracking::Off) };
        self.next_avail = plan.next_avail;
        self.marks = Some(marks);
        self.recovered = plan.requests.into_iter().rev().collect();
        Ok(Tracking::On { recovered: self.recovered.len() })
    }

    /// True if there are requests to submit again.
    #[inline]
    #[must_use]
    pub fn has_recovered(&self) -> bool {
        !self.recovered.is_empty()
    }

    /// Reads the next of them. It is marked already. Returns false if there is none.
    pub fn take_recovered(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> bool {
        let Some(head) = self.recovered.pop() else { return false };
        self.read_chain(head, guest, chain);
        true
    }

    /// Leaves them to the process that serves the ring next. Returns how many there are.
    pub fn forget_recovered(&mut self) -> u16 {
        u16::try_from(self.recovered.drain(..).len()).expect("at most as many as descriptors")
    }

    /// True if the requests in flight are recorded.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.marks.is_some()
    }

    /// Marks what is written to the used ring in `log` from now on, and all of it at once.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
        self.mark(0, self.used.len());
    }

    /// First slot and number of the unpublished used entries.
    #[must_use]
    pub fn unpublished(&self) -> (usize, usize) {
        (self.slot(self.published), self.next_used.wrapping_sub(self.published).into())
    }

    /// Marks used.idx and `count` used entries from slot `first` on.
    pub fn mark_used(&self, (first, count): (usize, usize)) {
        let before_end = count.min(usize::from(self.size) - first);
        self.mark(IDX, 2);
        self.mark(RING + 8 * first, 8 * before_end);
        self.mark(RING, 8 * (count - before_end));
    }

    fn mark(&self, offset: usize, len: usize) {
        if let Some(log) = &self.log {
            log.mark_used(offset, len);
        }
    }

    /// Number of descriptors.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The next avail index, as GET_VRING_BASE returns it.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.next_avail.into()
    }

    /// Number of available chains. An acquire load: all that the driver wrote before it made them available is visible.
    ///
    /// # Errors
    /// [`RingFault`]
    #[inline]
    pub fn available(&self) -> Result<u16, RingFault> {
        let offered = self.avail.load_acquire_u16(IDX);
        let count = offered.wrapping_sub(self.next_avail);
        if count > self.size {
            return Err(self.too_many(offered));
        }
        Ok(count)
    }

    /// Out of line: the fault would be prepared in each call of [`Self::available`] otherwise.
    #[cold]
    #[inline(never)]
    fn too_many(&self, offered: u16) -> RingFault {
        RingFault::AvailIndex { taken: self.next_avail, offered, size: self.size }
    }

    /// Takes the next chain. [`Self::available`] must not be 0.
    ///
    /// # Errors
    /// [`RingFault`]. Nothing has been taken.
    #[inline]
    pub fn take(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> Result<(), RingFault> {
        let [head] = self.avail_ring.read(self.next_avail.into());
        if head >= self.size {
            return Err(RingFault::Head { head, size: self.size });
        }
        self.advance(head);
        self.read_chain(head, guest, chain);
        Ok(())
    }

    /// Reads the chain at `head`, which is below `size`.
    #[inline]
    fn read_chain(&self, head: u16, guest: &mut GuestMemoryView, chain: &mut Chain) {
        let limits = WalkLimits { size: self.size, indirect: self.indirect, longest_table: MAX_SIZE };
        chain.fill(head, &limits, |index| Descriptor::from_words(self.desc.read(usize::from(index))), guest);
    }

    /// The chain at `head` has been taken.
    #[inline]
    fn advance(&mut self, head: u16) {
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(marks) = &mut self.marks {
            marks.take(head);
        }
    }

    /// Returns a chain with `len` bytes written to it. The driver sees it after [`Self::publish`].
    #[inline(always)]
    pub fn push_used(&mut self, head: Head, len: u32) {
        self.used_ring.write(self.next_used.into(), [u32::from(head.id()), len]);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(marks) = &mut self.marks {
            marks.push(head.id());
        }
    }

    /// True if there are unpublished used entries.
    #[inline]
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Publishes all used entries. Returns true if the driver must be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if let Some(marks) = &self.marks {
            marks.before_publish();
        }
        self.used.store_release_u16(IDX, self.next_used);
        self.published = self.next_used;
        // The driver writes used_event or its flags, then reads used.idx; we write used.idx, then read those. Without a full
        // fence on both sides, each could miss the other's write (virtio 1.2 §2.7.7.1).
        fence(Ordering::SeqCst);
        if let Some(marks) = &mut self.marks {
            marks.after_publish(self.next_used);
        }
        if !self.event_idx {
            return self.avail.read_u16(0) & AVAIL_F_NO_INTERRUPT == 0;
        }
        let before = self.signalled_used.replace(self.next_used);
        let used_event = self.avail.read_u16(RING + 2 * usize::from(self.size));
        // virtio 1.2 §2.7.10: notify if used_event is among the entries added since `before`.
        before.is_none_or(|before| {
            self.next_used.wrapping_sub(used_event).wrapping_sub(1) < self.next_used.wrapping_sub(before)
        })
    }

    /// Enables the driver's kicks. A chain made available meanwhile brings none, so the caller must poll once more before it
    /// sleeps.
    pub fn arm(&self) {
        if self.event_idx {
            self.ask_for_kick_at(self.next_avail);
        } else {
            self.used.write_u16(0, 0);
            self.mark(0, 2);
        }
        // Write avail_event or the flags before the last poll, as the driver does before it reads used.idx.
        fence(Ordering::SeqCst);
    }

    /// Suppresses the driver's kicks while the worker polls. With EVENT_IDX an index that has passed does, until the next one
    /// wraps around to it: after a completion has ended the sleep, avail_event is still that of the next request.
    pub fn disarm(&self) {
        if self.event_idx {
            self.ask_for_kick_at(self.next_avail.wrapping_sub(1));
        } else {
            self.used.write_u16(0, USED_F_NO_NOTIFY);
            self.mark(0, 2);
        }
    }

    /// Writes avail_event (virtio 1.2 §2.7.10).
    fn ask_for_kick_at(&self, index: u16) {
        let avail_event = RING + 8 * usize::from(self.size);
        self.used.write_u16(avail_event, index);
        self.mark(avail_event, 2);
    }

    /// Ring slot of a free-running index.
    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }
}

impl FastRing for SplitRing {
    #[inline(always)]
    fn prefetch(&self, count: u16) {
        for n in 0..count {
            let [head] = self.avail_ring.read(self.next_avail.wrapping_add(n).into());
            self.desc.line(head.into()).prefetch();
            if let Some(table) = self.tables.get(usize::from(head)) {
                table.prefetch();
            }
        }
    }

    #[inline(always)]
    fn remember(&mut self, head: Head, table: Line) {
        if let Some(place) = self.tables.get_mut(usize::from(head.id())) {
            *place = table;
        }
    }

    #[inline(always)]
    fn push_used(&mut self, head: Head, len: u32) {
        Self::push_used(self, head, len);
    }

    #[inline(always)]
    fn peek_fast(&mut self, guest: &mut BatchView<'_>) -> Option<FastRequest> {
        let [id] = self.avail_ring.read(self.next_avail.into());
        let entry = |index: u16| self.desc.get(index.into()).map(FastDescriptor::split);
        let (first, next) = entry(id)?;
        let head = Head::new(id, 0);
        if let Some(table) = first.table() {
            let table = guest.descriptors(table, 3).filter(|_| self.indirect)?;
            return FastRequest::of_split_table(head, [0, 1, 2].map(|n| table.read(n)));
        }
        let (data, last) = entry(next)?;
        let (status, _) = entry(last)?;
        let linked = first.is_linked() && data.is_linked() && !status.is_linked();
        if linked { FastRequest::new(head, [first, data, status]) } else { None }
    }

    #[inline(always)]
    fn take_fast(&mut self, head: Head) {
        self.advance(head.id());
    }

    /// It has only been looked at.
    fn leave_fast(&mut self, _: Head) {}
}
