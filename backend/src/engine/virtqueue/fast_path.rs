//! The fast path for the most common request: three descriptors, for a header of 16 bytes, one data buffer, and a status byte,
//! in the ring or in an indirect table.
//!
//! This shape needs no list of buffers. The fast path accepts a request only if [`Chain`] and [`parse`] would accept it with the
//! same result. Any other chain is left in the ring for them.
//!
//! [`Chain`]: super::chain::Chain
//! [`parse`]: crate::engine::request::parse

use super::chain::Head;
use super::descriptor::{INDIRECT, NEXT, WRITE};
use crate::addr::Gpa;
use crate::engine::guest_memory::BatchView;
use crate::engine::inflight_region::Recorded;
use crate::sys::Line;

/// Bytes of a request's header (virtio 1.2 §5.2.6).
const HEADER: u64 = 16;

/// Bytes of an indirect table of three descriptors.
const TABLE: u32 = 48;

/// The fields that descriptors of both layouts have (virtio 1.2 §2.7.5, §2.8.13).
#[derive(Clone, Copy)]
pub struct FastDescriptor {
    addr: u64,
    /// The length, and above it the flags that matter: so they are compared at once.
    shape: u64,
}

/// Flags in [`FastDescriptor::shape`].
const fn flags(flags: u16) -> u64 {
    (flags as u64) << 32
}

/// The `next` field of a descriptor of a split ring, in its second word.
const fn next(next: u16) -> u64 {
    (next as u64) << 48
}

impl FastDescriptor {
    /// Decodes a descriptor of a split ring. Returns it and its `next` field.
    #[inline]
    #[must_use]
    pub fn split([addr, rest]: [u64; 2]) -> (Self, u16) {
        let [_, next] = halves(rest);
        (Self { addr, shape: rest & (u64::from(u32::MAX) | flags(u16::MAX)) }, next)
    }

    /// Decodes a descriptor of a packed ring, without the AVAIL and USED flags. Returns it and its buffer ID.
    #[inline]
    #[must_use]
    pub fn packed([addr, rest]: [u64; 2]) -> (Self, u16) {
        let [id, _] = halves(rest);
        let above = rest >> 16 & flags(NEXT | WRITE | INDIRECT);
        (Self { addr, shape: rest & u64::from(u32::MAX) | above }, id)
    }

    /// The address of the indirect table, if this is an indirect descriptor with a table of three entries.
    #[inline]
    #[must_use]
    pub fn table(self) -> Option<Gpa> {
        (self.shape == flags(INDIRECT) | u64::from(TABLE)).then_some(Gpa(self.addr))
    }

    /// True if another descriptor follows and this one is not indirect.
    #[inline]
    #[must_use]
    pub fn is_linked(self) -> bool {
        self.shape & flags(NEXT | INDIRECT) == flags(NEXT)
    }

    /// Its length and flags, without NEXT.
    #[inline]
    fn alone(self) -> u64 {
        self.shape & !flags(NEXT)
    }

    /// True if this is a data buffer, with the flags that those have.
    #[inline]
    fn is_data(self) -> bool {
        self.shape & flags(!(NEXT | WRITE)) == 0
    }
}

/// The two 16-bit halves of the high 32 bits of a word.
#[inline]
fn halves(word: u64) -> [u16; 2] {
    let [_, _, low, high]: [u16; 4] = zerocopy::transmute!(word);
    [low, high]
}

/// The three buffers of a fast request, not yet checked against guest memory.
#[derive(Clone, Copy, Debug)]
pub struct FastBuffers {
    /// The device-readable header of 16 bytes.
    pub header: Gpa,
    /// Where the data start.
    pub data: Gpa,
    /// Bytes of data.
    pub len: u32,
    /// True if the data are device-writable.
    pub writable: bool,
    /// The device-writable status byte.
    pub status: Gpa,
}

/// A request of the fast shape, not yet checked against guest memory.
#[derive(Debug)]
#[must_use = "it is taken or left"]
pub struct FastRequest {
    head: Head,
    buffers: FastBuffers,
}

impl FastRequest {
    /// The request of three consecutive descriptors, if they have the fast shape. Always inlined: as a call it would pass all
    /// of them through memory.
    #[inline(always)]
    pub fn new(head: Head, [header, data, status]: [FastDescriptor; 3]) -> Option<Self> {
        let shape = header.alone() == HEADER && data.is_data() && status.alone() == flags(WRITE) | 1;
        if !shape {
            return None;
        }
        Some(Self::of_buffers(head, [header.addr, data.addr, status.addr], data.shape))
    }

    /// The request of the indirect table of a split ring, whose descriptors follow each other in it.
    #[inline(always)]
    pub fn of_split_table(head: Head, [header, data, status]: [[u64; 2]; 3]) -> Option<Self> {
        // Whole words, and no flags but those that are expected: three comparisons. The last descriptor's `next` has no meaning.
        let shape = header[1] == HEADER | flags(NEXT) | next(1)
            && (data[1] & !flags(WRITE)) >> 32 == (flags(NEXT) | next(2)) >> 32
            && status[1] << 16 == (flags(WRITE) | 1) << 16;
        if !shape {
            return None;
        }
        Some(Self::of_buffers(head, [header[0], data[0], status[0]], data[1]))
    }

    /// `shape` is the second word of the data's descriptor.
    #[inline(always)]
    fn of_buffers(head: Head, [header, data, status]: [u64; 3], shape: u64) -> Self {
        let [len, _]: [u32; 2] = zerocopy::transmute!(shape);
        let writable = shape & flags(WRITE) != 0;
        let buffers = FastBuffers { header: Gpa(header), data: Gpa(data), len, writable, status: Gpa(status) };
        Self { head, buffers }
    }

    /// The same, of a chain that is recorded in the inflight region.
    #[inline]
    pub fn recorded(self, record: Recorded) -> Self {
        Self { head: self.head.recorded(record), ..self }
    }

    /// Identifies the chain in its used entry.
    #[inline]
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// Its header, data and status.
    #[inline]
    #[must_use]
    pub fn buffers(&self) -> FastBuffers {
        self.buffers
    }
}

/// What the fast path needs of a ring of either layout.
pub trait FastRing {
    /// Brings in the descriptors of the next `count` chains, and their indirect tables if the ring can guess where they are.
    #[inline(always)]
    fn prefetch(&self, _count: u16) {}
    /// Remembers where the indirect table of the chain at `head` was, for [`Self::prefetch`].
    #[inline(always)]
    fn remember(&mut self, _head: Head, _table: Line) {}
    /// See [`super::Virtqueue::peek_fast`].
    fn peek_fast(&mut self, guest: &mut BatchView<'_>) -> Option<FastRequest>;
    /// Takes the chain that [`Self::peek_fast`] returned.
    fn take_fast(&mut self, head: Head);
    /// Leaves the chain that [`Self::peek_fast`] returned in the ring.
    fn leave_fast(&mut self, head: Head);
    /// See [`super::Virtqueue::push_used`].
    fn push_used(&mut self, head: Head, len: u32);
}
