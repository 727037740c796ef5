//! The record of a packed ring: a copy of each descriptor taken. Entries that are not in use form a list.
//!
//! Each group of fields that belongs together is written by one store: the mark and the links of a chain, both free heads, and
//! both used positions. So a crash never leaves a position with the wrap counter of another.

use super::packed_layout::{COUNTER, FREE, FREE_HEADS, HEADER, INFLIGHT, LINKS, REST, USED, Words, read};
use super::packed_list::{List, PerEntry, links, per_entry};
use super::packed_recovery::{PackedPlan, PackedRecovery, PackedState, recover};
use super::recorded::{FreeHeads, Recorded};
use super::{Contradiction, InflightRegion, VERSION};
use crate::engine::virtqueue::descriptor::PackedWords;
use crate::engine::virtqueue::position::Position;
use crate::sys::{SharedEntry, SharedMemory};

/// The index of no entry.
const NONE: u16 = u16::MAX;

/// Marks the requests that a packed ring takes and publishes. It never reads the record: the list of free entries is kept here.
pub(in crate::engine) struct PackedMarks {
    header: SharedEntry<SharedMemory, u64, 4>,
    list: List,
    /// The text's global counter.
    counter: u64,
    /// The first free entry.
    free: FreeHeads,
    /// [`Self::note`]: the entry of the descriptor noted last.
    noted: u16,
    /// How many chains are pushed and not yet published, and which.
    pushed: u16,
    batch: PerEntry<Recorded>,
    /// The position before the next publication.
    used: Position,
}

impl PackedMarks {
    /// Recovers the record of a ring, or initializes it. `state` gets the number of a slot and returns the ring's state with
    /// that slot's flags. `None` if the record must not be used.
    pub(in crate::engine) fn start(
        region: &InflightRegion,
        state: impl FnOnce(u16) -> PackedState,
    ) -> Result<Option<(Self, PackedPlan)>, Contradiction> {
        let mut record = read(region);
        let state = state(record.old_used_idx);
        let plan = match recover(&record, region.entries, &state)? {
            PackedRecovery::Unknown => return Ok(None),
            PackedRecovery::Fresh(used) => {
                initialize(region, used);
                record = read(region);
                PackedPlan::empty(used)
            }
            PackedRecovery::Resume(plan) => plan,
        };
        let mut marks = Self {
            header: words(region, 0, 1).into_owned().into_entry(0),
            list: List::new(words(region, HEADER, region.entries).into_owned(), &record.entries),
            counter: plan.next_counter,
            free: FreeHeads::both(plan.free_head),
            noted: plan.free_head,
            pushed: 0,
            batch: per_entry(),
            used: plan.used,
        };
        marks.settle(&plan);
        for request in &plan.requests {
            // What follows a chain in flight means nothing. It may even be an entry of the chain, which `link` would stop at.
            let last = record.entries[usize::from(request.entry)].last;
            marks.list.set_next(last, NONE);
        }
        Ok(Some((marks, plan)))
    }

    /// Writes what the recovery has decided. Killed in between, the next recovery decides the same: a publication that is
    /// completed has its old position until last, one that is rolled back has its new free head until last.
    fn settle(&mut self, plan: &PackedPlan) {
        let (free, used) = (self.free, self.used);
        if plan.completed {
            self.set_free(free);
            self.set_used(used, used);
        } else {
            self.set_used(used, used);
            self.set_free(free);
        }
        plan.stale.iter().for_each(|&entry| self.clear(entry));
    }

    /// The entry that the next chain starts at.
    #[inline]
    pub(in crate::engine) fn next_entry(&self) -> u16 {
        self.free.entry()
    }

    /// Copies the next descriptor of a chain, as it was read from the ring, to `entry`, which is still free. Returns the entry of
    /// the one after it. The first is at [`Self::next_entry`].
    #[inline]
    pub(in crate::engine) fn note(&mut self, entry: u16, descriptor: PackedWords) -> u16 {
        self.list.array().write_words(entry.into(), REST, swapped(descriptor));
        self.noted = entry;
        self.list.next(entry).entry()
    }

    /// The chain of `entries` descriptors that has been noted is taken. It is marked before anything is done for it.
    #[inline]
    pub(in crate::engine) fn take(&mut self, entries: u16) -> Recorded {
        let (head, after) = (self.free.entry(), self.list.next(self.noted));
        let marked = links(self.list.next(head).entry(), self.noted, entries);
        self.list.array().write_words(head.into(), COUNTER, [self.counter]);
        self.list.array().write_words(head.into(), LINKS, [marked]);
        self.leave_list(after);
        Recorded::new(head, after)
    }

    /// [`Self::note`] for all descriptors of a chain, and [`Self::take`], if the next `N` free entries are neighbours: one check,
    /// and offsets that are constants. `None` if they are not: then nothing has been written.
    ///
    /// Chains return to the list as they were taken, so neighbours remain neighbours while all chains have one length.
    #[inline(always)]
    pub(in crate::engine) fn take_neighbours<const N: usize>(
        &mut self,
        descriptors: &[PackedWords; N],
    ) -> Option<Recorded> {
        let head = self.free.entry();
        let (marked, after) = self.list.neighbours::<N>(head)?;
        let run = self.list.array().run::<N>(head.into())?;
        // By reference: the compiler unrolls it, and keeps the descriptors in registers.
        for (n, &descriptor) in descriptors.iter().enumerate() {
            run.write_words(n, REST, swapped(descriptor));
        }
        run.write_words(0, COUNTER, [self.counter]);
        run.write_words(0, LINKS, [marked]);
        self.leave_list(after);
        Some(Recorded::new(head, after))
    }

    /// The chain marked counts as taken when its entries have left the list, which starts at `after` then.
    #[inline(always)]
    fn leave_list(&mut self, after: FreeHeads) {
        self.counter = self.counter.wrapping_add(1);
        self.free = after;
        self.set_free(after);
    }

    /// The chain of the last [`Self::take_neighbours`] stays in the ring. Killed in between, it is in flight: then it is the
    /// last one taken, and the next one of the ring follows it.
    #[cold]
    pub(in crate::engine) fn untake(&mut self, chain: Recorded) {
        self.counter = self.counter.wrapping_sub(1);
        self.free = FreeHeads::both(chain.first());
        self.set_free(self.free);
        self.clear(chain.first());
    }

    /// The chain is in the ring as used, and not yet published. Nothing is written: a chain may be taken
    /// before the publication, and the list must not have grown then.
    #[inline]
    pub(in crate::engine) fn push(&mut self, chain: Recorded) {
        self.batch[usize::from(self.pushed)] = chain;
        self.pushed += 1;
    }

    /// The flags that publish the batch will be written next. The ring's used position is `used` afterwards.
    #[inline]
    pub(in crate::engine) fn before_publish(&mut self, used: Position) {
        let before = self.free.entry();
        let first = self.list.insert(&self.batch[..self.pushed.into()], before);
        self.free = FreeHeads::both(first);
        self.set_free(FreeHeads::new(first, before));
        self.set_used(used, self.used);
        self.used = used;
    }

    /// The batch has been published. There must be a full fence between that and this.
    #[inline]
    pub(in crate::engine) fn after_publish(&mut self) {
        let (eights, rest) = self.batch[..self.pushed.into()].as_chunks::<8>();
        eights.iter().for_each(|eight| eight.iter().for_each(|&chain| self.clear(chain.first())));
        rest.iter().for_each(|&chain| self.clear(chain.first()));
        self.pushed = 0;
        self.set_free(self.free);
        self.set_used(self.used, self.used);
    }

    #[inline]
    fn clear(&self, entry: u16) {
        self.list.array().write_part::<u8, INFLIGHT>(entry.into(), 0);
    }

    /// Writes both free heads by one store.
    #[inline]
    fn set_free(&self, heads: FreeHeads) {
        self.header.write_part::<u32, FREE_HEADS>(heads.word());
    }

    #[inline]
    fn set_used(&self, new: Position, old: Position) {
        self.header.write_part::<u64, USED>(used_word(new, old));
    }
}

/// The descriptor as the record has it: its second word first, with its halves exchanged.
#[inline]
fn swapped([addr, rest]: PackedWords) -> [u64; 2] {
    [rest.rotate_left(32), addr]
}

/// With entry 0 as both free heads.
fn first_free_word(entries: u16) -> u64 {
    u64::from(VERSION) | u64::from(entries) << 16
}

#[inline]
fn used_word(new: Position, old: Position) -> u64 {
    let slots = u64::from(new.slot) | u64::from(old.slot) << 16;
    slots | u64::from(new.wrap) << 32 | u64::from(old.wrap) << 40
}

fn words(region: &InflightRegion, at: usize, count: u16) -> Words<&SharedMemory> {
    region.memory.array(at, count.into()).expect("`InflightRegion::new` has checked size and alignment")
}

/// Makes a record without marks, whose entries are all free. It counts once its version is written.
fn initialize(region: &InflightRegion, used: Position) {
    let count = region.entries;
    let (header, entries) = (words(region, 0, 1), words(region, HEADER, count));
    header.write_word(0, FREE, 0);
    header.write(0, [0, 0, used_word(used, used), 0]);
    for entry in 0..count {
        // The last one's successor does not exist, which ends the list.
        entries.write(entry.into(), [(u64::from(entry) + 1) << 16, 0, 0, 0]);
    }
    header.write_word(0, FREE, first_free_word(count));
}
