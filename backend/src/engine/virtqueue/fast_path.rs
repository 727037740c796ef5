//! The request that nearly all drivers make nearly always: three descriptors, of a header of 16 bytes, one buffer of data, and
//! one byte for the status, in the ring or in an indirect table.
//!
//! A shape like this needs no list of buffers to be made and cut again. What is accepted here is just what [`Chain`] and
//! [`parse`] would make of it, with the same answers to the same questions; anything else is left to them, not yet taken.
//!
//! [`Chain`]: super::chain::Chain
//! [`parse`]: crate::engine::request::parse

use super::chain::Head;
use super::descriptor::{INDIRECT, NEXT, WRITE};
use crate::addr::{Gpa, Span};

/// Bytes of a request's header (virtio 1.2 §5.2.6).
const HEADER: u64 = 16;

/// Bytes of an indirect table of three descriptors.
const TABLE: u32 = 48;

/// What a descriptor says of its own buffer (virtio 1.2 §2.7.5, §2.8.13).
#[derive(Clone, Copy)]
pub struct FastDescriptor {
    addr: u64,
    len: u32,
    flags: u16,
}

impl FastDescriptor {
    /// A descriptor of a split ring, and the index of its successor.
    #[inline]
    #[must_use]
    pub fn split([addr, rest]: [u64; 2]) -> (Self, u16) {
        let (len, [flags, next]) = halves(rest);
        (Self { addr, len, flags }, next)
    }

    /// A descriptor of a packed ring, and its buffer ID. The flags that say whose it is are left out.
    #[inline]
    #[must_use]
    pub fn packed([addr, rest]: [u64; 2]) -> (Self, u16) {
        let (len, [id, flags]) = halves(rest);
        (Self { addr, len, flags: flags & (NEXT | WRITE | INDIRECT) }, id)
    }

    /// The table that an indirect descriptor names, if it is one of three.
    #[inline]
    #[must_use]
    pub fn table(self) -> Option<Span<Gpa>> {
        if self.flags != INDIRECT || self.len != TABLE {
            return None;
        }
        Span::new(Gpa(self.addr), TABLE.into())
    }

    /// True if another follows, and nothing else is said of it.
    #[inline]
    #[must_use]
    pub fn is_linked(self) -> bool {
        self.flags & (NEXT | INDIRECT) == NEXT
    }
}

/// The low half of a word, and the two quarters of its high half.
#[inline]
fn halves(word: u64) -> (u32, [u16; 2]) {
    #[derive(zerocopy::FromBytes)]
    #[repr(C)]
    struct Halves(u32, [u16; 2]);
    let Halves(low, high) = zerocopy::transmute!(word);
    (low, high)
}

/// The three buffers of a request of this shape, as its descriptors claim them.
#[derive(Clone, Copy, Debug)]
pub struct FastBuffers {
    /// 16 bytes that the device reads.
    pub header: Gpa,
    /// The data.
    pub data: Span<Gpa>,
    /// The device writes the data.
    pub writable: bool,
    /// One byte that the device writes.
    pub status: Gpa,
}

/// A request of this shape, as its descriptors claim it; nothing has been looked up.
#[derive(Clone, Copy, Debug)]
pub struct FastRequest {
    head: Head,
    header: Gpa,
    data: Span<Gpa>,
    writable: bool,
    status: Gpa,
}

impl FastRequest {
    /// The request of three descriptors in a row, if they have the shape.
    #[inline]
    #[must_use]
    pub fn new(head: Head, [header, data, status]: [FastDescriptor; 3]) -> Option<Self> {
        let shape = u64::from(header.len) == HEADER
            && header.flags & (WRITE | INDIRECT) == 0
            && data.flags & INDIRECT == 0
            && status.len == 1
            && status.flags & (WRITE | INDIRECT) == WRITE;
        if !shape {
            return None;
        }
        Some(Self {
            head,
            header: Gpa(header.addr),
            data: Span::new(Gpa(data.addr), data.len.into())?,
            writable: data.flags & WRITE != 0,
            status: Gpa(status.addr),
        })
    }

    /// What the chain is given back by.
    #[inline]
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// Where its header, data and status lie, and whether the device may write the data.
    #[inline]
    #[must_use]
    pub fn buffers(&self) -> FastBuffers {
        let Self { header, data, writable, status, .. } = *self;
        FastBuffers { header, data, writable, status }
    }
}
