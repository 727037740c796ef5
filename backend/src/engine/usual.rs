//! The request that nearly all drivers make nearly always: three descriptors, of a header of 16 bytes, one buffer of data, and
//! one byte for the status, in the ring or in an indirect table.
//!
//! A shape like this needs no list of buffers to be made and cut again. What is accepted here is just what [`Chain`] and
//! [`parse`] would make of it, with the same answers to the same questions; anything else is left to them, not yet taken.
//!
//! [`Chain`]: super::chain::Chain
//! [`parse`]: super::request::parse

use super::chain::{Head, INDIRECT, NEXT, WRITE};
use super::guest::Guest;
use super::request::{Disk, HEADER, Operation};
use super::ticket::Ticket;
use crate::addr::{Gpa, Iova, Span};

/// Bytes of an indirect table of three descriptors.
const TABLE: u32 = 48;

/// What a descriptor says of its own buffer (virtio 1.2 §2.7.5, §2.8.13).
#[derive(Clone, Copy)]
pub struct Part {
    addr: u64,
    len: u32,
    flags: u16,
}

impl Part {
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

/// A request of this shape, as its descriptors claim it; nothing has been looked up.
#[derive(Clone, Copy, Debug)]
pub struct Usual {
    head: Head,
    header: Gpa,
    data: Span<Gpa>,
    writable: bool,
    status: Gpa,
}

impl Usual {
    /// The request of three descriptors in a row, if they have the shape.
    #[inline]
    #[must_use]
    pub fn new(head: Head, [header, data, status]: [Part; 3]) -> Option<Self> {
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

    /// The transfer it asks for, if it asks for one that can be done.
    #[inline]
    #[must_use]
    pub fn transfer(&self, guest: &mut Guest, disk: &Disk) -> Option<Transfer> {
        let (kind, sector) = guest.header(self.header)?;
        let operation = disk.transfer_of(kind, self.writable)?;
        if !guest.has_status(self.status) {
            return None;
        }
        let data = guest.data(self.data)?;
        let block = disk.block(sector, data.len()).ok()?;
        Some(Transfer { operation, block, data, status: self.status })
    }
}

/// A transfer of one buffer, everything about it checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Read or write.
    pub operation: Operation,
    /// First logical block.
    pub block: u64,
    /// The data, whole blocks, as the device names them.
    pub data: Span<Iova>,
    /// Where the status goes.
    pub status: Gpa,
}

impl Transfer {
    /// The debt of the chain that asked for it.
    #[inline]
    pub fn ticket(&self, head: Head) -> Ticket {
        Ticket::new(head, Some(self.status))
    }
}
