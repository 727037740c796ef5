//! A descriptor chain of a split ring (virtio 1.2 §2.7.5) or a packed one (§2.8.6). The walk does not trust the driver: each
//! descriptor is read once into a local, and the size of the table bounds the number of steps. Faults are recorded in the
//! chain.
//!
//! There are two kinds of faults. A bad *link* (an index outside the table, a loop, a bad indirect table) ends the walk, so the
//! position of the status byte is unknown. After a bad *buffer* (wrong order, an address that wraps) the walk continues, so
//! the request can still get an error status.

use super::descriptor::{DESCRIPTOR, Descriptor, INDIRECT, NEXT, PackedDescriptor, WRITE};
use crate::addr::{Gpa, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::inflight_region::Recorded;

/// Identifies a chain in its used entry. One word, from the lowest bits on: ID, number of descriptors, record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head(u64);

impl Head {
    /// A head with this ID, of a chain of `entries` descriptors.
    #[inline]
    #[must_use]
    pub fn new(id: u16, entries: u16) -> Self {
        Self(u64::from(id) | u64::from(entries) << 16)
    }

    /// The same, of a chain that is recorded in the inflight region of a packed ring.
    #[inline]
    #[must_use]
    pub fn recorded(self, record: Recorded) -> Self {
        Self(self.0 & 0xffff_ffff | u64::from(record.word()) << 32)
    }

    /// Its record. The default if it has none, and for a split ring.
    #[inline]
    #[must_use]
    pub fn record(self) -> Recorded {
        Recorded::from_word(u32::try_from(self.0 >> 32).expect("shifted"))
    }

    /// Split: index of the first descriptor. Packed: the buffer ID.
    #[inline]
    #[must_use]
    pub fn id(self) -> u16 {
        self.part(0)
    }

    /// Number of descriptors that the chain occupies in a packed ring; 0 for a split ring.
    #[inline]
    #[must_use]
    pub fn entries(self) -> u16 {
        self.part(16)
    }

    #[inline]
    fn part(self, shift: u32) -> u16 {
        u16::try_from(self.0 >> shift & 0xffff).expect("masked")
    }
}

/// Why a chain is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// `next` points outside the table.
    #[error("a descriptor links to {next} in a table of {entries}")]
    Index {
        /// The index.
        next: u16,
        /// Entries of the table.
        entries: u16,
    },
    /// More steps than the table has entries: a loop.
    #[error("the descriptors of a table of {entries} form a loop")]
    Loop {
        /// Entries of the table.
        entries: u16,
    },
    /// VIRTIO_RING_F_INDIRECT_DESC was not negotiated.
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    /// INDIRECT and NEXT together, virtio 1.2 §2.7.5.3.1.
    #[error("an indirect descriptor with a successor")]
    IndirectWithNext,
    /// INDIRECT in a chain of a packed ring, virtio 1.2 §2.8.19.
    #[error("an indirect descriptor in a chain")]
    IndirectInChain,
    /// INDIRECT inside an indirect table, virtio 1.2 §2.7.5.3.1.
    #[error("an indirect descriptor inside an indirect table")]
    NestedIndirect,
    /// The length of the indirect table is zero, not a whole number of descriptors, or too large.
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// The indirect table is not in guest memory.
    #[error("an indirect table at {0}, which is not guest memory")]
    IndirectMemory(Gpa),
    /// Device-readable after device-writable, virtio 1.2 §2.7.4.2.
    #[error("a readable buffer after a writable one")]
    BufferOrder,
    /// The buffer runs past the end of the address space.
    #[error("a buffer at {addr} of {len} bytes, past the end of the address space")]
    Wraps {
        /// Where it starts.
        addr: Gpa,
        /// Its length.
        len: u32,
    },
}

/// Limits of a walk.
pub struct WalkLimits {
    /// Split: entries of the descriptor table. Packed: descriptors that the driver owns.
    pub size: u16,
    /// True if indirect tables were negotiated.
    pub indirect: bool,
    /// Largest number of entries of an indirect table. It may exceed the ring's size: Linux builds tables of seg_max + 2 entries
    /// despite virtio 1.2 §2.7.5.3.1, and §2.7.4.1 lets a device have a reasonable limit.
    pub longest_table: u16,
}

/// The buffers of one chain, not yet checked against guest memory. Reused for every chain, so that the vectors keep their
/// capacity.
#[derive(Debug, Default)]
pub struct Chain {
    head: Head,
    readable: Vec<Span<Gpa>>,
    writable: Vec<Span<Gpa>>,
    fault: Option<ChainFault>,
    /// False if the walk did not reach the end of the chain, or if the last writable buffer wraps.
    end_known: bool,
}

impl Chain {
    /// Identifies the chain in its used entry.
    #[inline]
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// The chain's record in the inflight region starts at this entry.
    #[inline]
    pub(super) fn set_record(&mut self, record: Recorded) {
        self.head = self.head.recorded(record);
    }

    /// Device-readable buffers, in order. Empty ones are left out, because framing carries no meaning (virtio 1.2 §2.7.4.1).
    #[inline]
    #[must_use]
    pub fn readable(&self) -> &[Span<Gpa>] {
        &self.readable
    }

    /// Device-writable buffers, in order.
    #[inline]
    #[must_use]
    pub fn writable(&self) -> &[Span<Gpa>] {
        &self.writable
    }

    /// The first fault.
    #[inline]
    #[must_use]
    pub fn fault(&self) -> Option<ChainFault> {
        self.fault
    }

    /// The last device-writable byte, if the walk reached the end of the chain.
    #[inline]
    #[must_use]
    pub fn last_writable(&self) -> Option<Gpa> {
        if self.end_known { self.writable.last().map(Span::last) } else { None }
    }

    /// Reads the chain that starts at `head`. `entry` reads the descriptor table.
    #[inline]
    pub fn fill(
        &mut self,
        head: u16,
        limits: &WalkLimits,
        entry: impl Fn(u16) -> Descriptor,
        guest: &mut GuestMemoryView,
    ) {
        self.clear();
        self.head = Head::new(head, 0);
        let walked = self.walk(limits, entry, guest);
        self.finish_walk(walked);
    }

    /// Reads a chain of a packed ring. `entry` reads its n-th descriptor. Returns false if the chain does not end within
    /// `limits.size` descriptors.
    #[inline]
    pub fn fill_packed(
        &mut self,
        limits: &WalkLimits,
        mut entry: impl FnMut(u16) -> PackedDescriptor,
        guest: &mut GuestMemoryView,
    ) -> bool {
        self.clear();
        let first = entry(0);
        if first.flags & (INDIRECT | NEXT) == INDIRECT {
            self.head = Head::new(first.id, 1);
            let walked = self.walk_packed_table(limits, first, guest);
            self.finish_walk(walked);
            return true;
        }
        let (mut descriptor, mut walked) = (first, Ok(()));
        for entries in 1..=limits.size {
            if descriptor.flags & INDIRECT != 0 {
                walked = Err(ChainFault::IndirectInChain);
            } else {
                self.add(descriptor.addr, descriptor.len, descriptor.flags);
            }
            if descriptor.flags & NEXT == 0 {
                // The last descriptor has the buffer ID (virtio 1.2 §2.8.6).
                self.head = Head::new(descriptor.id, entries);
                self.finish_walk(walked);
                return true;
            }
            if entries < limits.size {
                descriptor = entry(entries);
            }
        }
        false
    }

    #[inline]
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.fault = None;
        self.end_known = true;
    }

    #[inline]
    fn finish_walk(&mut self, walked: Result<(), ChainFault>) {
        if let Err(fault) = walked {
            self.fault.get_or_insert(fault);
            self.end_known = false;
        }
    }

    #[inline]
    fn walk(
        &mut self,
        limits: &WalkLimits,
        entry: impl Fn(u16) -> Descriptor,
        guest: &mut GuestMemoryView,
    ) -> Result<(), ChainFault> {
        match self.follow(self.head.id(), limits.size, |index| Ok(entry(index)))? {
            None => Ok(()),
            Some(table) => self.walk_table(limits, table, guest),
        }
    }

    /// Follows an indirect descriptor, the last of its chain. Its WRITE flag is ignored (virtio 1.2 §2.7.5.3.2).
    #[inline]
    fn walk_table(
        &mut self,
        limits: &WalkLimits,
        table: Descriptor,
        guest: &mut GuestMemoryView,
    ) -> Result<(), ChainFault> {
        if !limits.indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        if table.flags & NEXT != 0 {
            return Err(ChainFault::IndirectWithNext);
        }
        let (span, entries) = table_span(limits, table.addr, table.len)?;
        let nested = if let Some(table) = guest.descriptors(span, entries) {
            self.follow(0, entries, |index| Ok(Descriptor::from_words(table.read(usize::from(index)))))?
        } else {
            self.follow_across(span, entries, guest)?
        };
        nested.map_or(Ok(()), |_| Err(ChainFault::NestedIndirect))
    }

    /// [`Self::follow`] for a table that is misaligned or crosses a region boundary. Each entry must lie in one region.
    #[cold]
    fn follow_across(
        &mut self,
        table: Span<Gpa>,
        entries: u16,
        guest: &mut GuestMemoryView,
    ) -> Result<Option<Descriptor>, ChainFault> {
        let at = |index| table.slice(u64::from(DESCRIPTOR) * u64::from(index), u64::from(DESCRIPTOR));
        let mut read = |entry| guest.table_memory(entry).map(|(shared, offset)| shared.read(offset));
        let not_in_memory = ChainFault::IndirectMemory(table.start());
        self.follow(0, entries, |index| at(index).and_then(&mut read).ok_or(not_in_memory))
    }

    /// Adds the buffers of an indirect table of a packed ring: all entries in order. NEXT and the ID are ignored (virtio 1.2
    /// §2.8.7).
    #[inline]
    fn walk_packed_table(
        &mut self,
        limits: &WalkLimits,
        table: PackedDescriptor,
        guest: &mut GuestMemoryView,
    ) -> Result<(), ChainFault> {
        if !limits.indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        let (span, entries) = table_span(limits, table.addr, table.len)?;
        if let Some(table) = guest.descriptors(span, entries) {
            for n in 0..usize::from(entries) {
                self.add_from_table(PackedDescriptor::from_words(table.read(n)))?;
            }
            return Ok(());
        }
        // The table is misaligned or crosses a region boundary. Each entry must lie in one region.
        for n in 0..u64::from(entries) {
            let entry = span.slice(u64::from(DESCRIPTOR) * n, u64::from(DESCRIPTOR));
            let read = entry.and_then(|entry| guest.table_memory(entry)).map(|(shared, offset)| shared.read(offset));
            self.add_from_table(read.ok_or(ChainFault::IndirectMemory(span.start()))?)?;
        }
        Ok(())
    }

    #[inline]
    fn add_from_table(&mut self, descriptor: PackedDescriptor) -> Result<(), ChainFault> {
        let PackedDescriptor { addr, len, flags, .. } = descriptor;
        if flags & INDIRECT != 0 {
            return Err(ChainFault::NestedIndirect);
        }
        self.add(addr, len, flags);
        Ok(())
    }

    /// Adds the buffers of linked descriptors from `index` on. Stops at an indirect descriptor and returns it.
    #[inline]
    fn follow(
        &mut self,
        mut index: u16,
        entries: u16,
        mut entry: impl FnMut(u16) -> Result<Descriptor, ChainFault>,
    ) -> Result<Option<Descriptor>, ChainFault> {
        for _ in 0..entries {
            let descriptor = entry(index)?;
            if descriptor.flags & INDIRECT != 0 {
                return Ok(Some(descriptor));
            }
            self.add(descriptor.addr, descriptor.len, descriptor.flags);
            if descriptor.flags & NEXT == 0 {
                return Ok(None);
            }
            index = descriptor.next;
            if index >= entries {
                return Err(ChainFault::Index { next: index, entries });
            }
        }
        Err(ChainFault::Loop { entries })
    }

    #[inline]
    fn add(&mut self, addr: u64, len: u32, flags: u16) {
        if len == 0 {
            return;
        }
        let writable = flags & WRITE != 0;
        let Some(span) = Span::new(Gpa(addr), u64::from(len)) else {
            self.end_known &= !writable;
            self.fault.get_or_insert(ChainFault::Wraps { addr: Gpa(addr), len });
            return;
        };
        if writable {
            self.end_known = true;
            self.writable.push(span);
        } else {
            if !self.writable.is_empty() {
                self.fault.get_or_insert(ChainFault::BufferOrder);
            }
            self.readable.push(span);
        }
    }
}

/// Address range and number of entries of an indirect table, if its length is valid.
#[inline]
fn table_span(limits: &WalkLimits, addr: u64, len: u32) -> Result<(Span<Gpa>, u16), ChainFault> {
    let entries = u16::try_from(len / DESCRIPTOR)
        .ok()
        .filter(|&n| n > 0 && n <= limits.longest_table && len.is_multiple_of(DESCRIPTOR))
        .ok_or(ChainFault::IndirectLength(len))?;
    let span = Span::new(Gpa(addr), u64::from(len)).ok_or(ChainFault::IndirectMemory(Gpa(addr)))?;
    Ok((span, entries))
}
