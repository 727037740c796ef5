//! The kinds of address in this program. To confuse two of them means DMA to the wrong place, so each kind is a type. All
//! arithmetic on addresses is in this room, so overflow is handled once. [`IovaSlice`] translates between the first and the last.
//!
//! | type | address in | used in |
//! |---|---|---|
//! | [`Gpa`]  | the guest's physical address space | ring descriptors, memory regions |
//! | [`Qva`]  | the front-end's virtual address space | ring addresses in vhost-user messages |
//! | [`Iova`] | the device's DMA address space (the IOAS) | PRP entries, queue base registers |
//!
//! Virtual addresses of this process never appear as numbers: memory is accessed through [`crate::sys::SharedMemory`].

mod iova_slice;

use std::fmt;

pub use iova_slice::{IovaSlice, LAST_IOVA};

/// An address of one kind. Implemented by [`Gpa`], [`Qva`] and [`Iova`] only.
pub trait Address: Copy + Ord + fmt::Debug + fmt::Display {
    /// The number, as in a message or a register.
    fn raw(self) -> u64;
    /// The address with this number. Only for numbers that were read from a message or a register.
    fn from_raw(raw: u64) -> Self;
    /// `self + bytes`, or `None` past the end of the address space.
    #[inline]
    fn checked_add(self, bytes: u64) -> Option<Self> {
        self.raw().checked_add(bytes).map(Self::from_raw)
    }
    /// True if the address is a multiple of `alignment`, a power of two.
    #[inline]
    fn is_aligned(self, alignment: u64) -> bool {
        debug_assert!(alignment.is_power_of_two());
        self.raw() & (alignment - 1) == 0
    }
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl Address for $name {
            #[inline]
            fn raw(self) -> u64 {
                self.0
            }
            #[inline]
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address!(
    /// Guest physical address.
    Gpa
);
address!(
    /// Virtual address in the front-end's process (vhost-user: "user address").
    Qva
);
address!(
    /// I/O virtual address: the address in the device's DMA transactions.
    Iova
);

/// A non-empty range of addresses of one kind that does not wrap around.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span<A> {
    start: A,
    len: u64,
}

impl<A: Address> Span<A> {
    /// `len` bytes from `start`; `None` if empty or if the last byte lies past the end of the address space.
    #[inline]
    #[must_use]
    pub fn new(start: A, len: u64) -> Option<Self> {
        let last_offset = len.checked_sub(1)?;
        start.raw().checked_add(last_offset)?;
        Some(Self { start, len })
    }

    /// From the first to the last byte, both included.
    #[must_use]
    pub fn inclusive(first: A, last: A) -> Option<Self> {
        let len = last.raw().checked_sub(first.raw())?.checked_add(1)?;
        Self::new(first, len)
    }

    /// The first address.
    #[inline]
    #[must_use]
    pub fn start(&self) -> A {
        self.start
    }

    /// The number of bytes, at least one.
    #[expect(clippy::len_without_is_empty, reason = "a span is never empty")]
    #[inline]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The last address (inclusive, so that a span may end at the top of the address space).
    #[inline]
    #[must_use]
    pub fn last(&self) -> A {
        A::from_raw(self.start.raw() + (self.len - 1))
    }

    /// True if `other` lies wholly inside.
    #[inline]
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.offset_of_span(other).is_some()
    }

    /// Bytes from the start to `other`, if it lies wholly inside.
    #[inline]
    #[must_use]
    pub fn offset_of_span(&self, other: &Self) -> Option<u64> {
        // If `other` starts before `self`, the difference wraps to at least `self.len`, because no span wraps around.
        let offset = other.start.raw().wrapping_sub(self.start.raw());
        (offset < self.len && other.len <= self.len - offset).then_some(offset)
    }

    /// True if at least one address is in both.
    #[inline]
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }

    /// True if `address` lies inside.
    #[inline]
    #[must_use]
    pub fn contains(&self, address: A) -> bool {
        self.offset_of(address).is_some()
    }

    /// Bytes from the start to `address`, if it lies inside.
    #[inline]
    #[must_use]
    pub fn offset_of(&self, address: A) -> Option<u64> {
        let offset = address.raw().wrapping_sub(self.start.raw());
        (offset < self.len).then_some(offset)
    }

    /// `len` bytes from `offset` on; `None` if that is empty or not wholly inside.
    #[inline]
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Option<Self> {
        let inside = len != 0 && offset < self.len && len <= self.len - offset;
        inside.then(|| Self { start: A::from_raw(self.start.raw() + offset), len })
    }

    /// `len` bytes from the address `start` on; `None` if that is empty or not wholly inside.
    #[inline]
    #[must_use]
    pub fn slice_at(&self, start: A, len: u64) -> Option<Self> {
        // An address before the start wraps to an offset past the end.
        self.slice(start.raw().wrapping_sub(self.start.raw()), len)
    }

    /// The span cut at addresses that are multiples of `size` (a power of two), in order.
    pub fn chunks(self, size: u64) -> impl Iterator<Item = Self> {
        debug_assert!(size.is_power_of_two());
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let span = rest?;
            let to_boundary = size - (span.start.raw() & (size - 1));
            let len = span.len.min(to_boundary);
            rest = span.slice(len, span.len - len);
            span.slice(0, len)
        })
    }
}

/// A number of bytes that displays with a unit where it is a multiple: `2M`, `512K`, `1234`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 >> shift != 0 && self.0 & ((1 << shift) - 1) == 0 {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl<A: Address> fmt::Display for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, Bytes(self.len))
    }
}

impl<A: Address> fmt::Debug for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span<Gpa> {
        Span::new(Gpa(start), len).expect("a valid span")
    }

    #[test]
    fn a_span_is_never_empty_and_never_wraps() {
        assert_eq!(Span::new(Gpa(0x1000), 0), None);
        assert_eq!(Span::new(Gpa(u64::MAX), 2), None);
        assert!(Span::new(Gpa(u64::MAX), 1).is_some());
        assert_eq!(Span::inclusive(Gpa(5), Gpa(4)), None);
    }

    #[test]
    fn touching_spans_do_not_overlap() {
        assert!(!span(0, 0x1000).overlaps(&span(0x1000, 1)));
        assert!(span(0, 0x1001).overlaps(&span(0x1000, 1)));
    }

    #[test]
    fn chunks_are_cut_at_address_multiples_and_cover_the_span() {
        let chunks: Vec<_> = span(0x0f00, 0x2200).chunks(0x1000).collect();
        assert_eq!(chunks, [span(0xf00, 0x100), span(0x1000, 0x1000), span(0x2000, 0x1000), span(0x3000, 0x100)]);
    }

    #[test]
    fn chunks_reach_the_top_of_the_address_space() {
        let top = span(u64::MAX - 0xfff, 0x1000);
        assert_eq!(top.chunks(0x1000).collect::<Vec<_>>(), [top]);
    }

    #[test]
    fn a_slice_outside_is_refused() {
        assert_eq!(span(0x1000, 0x100).slice(0xff, 1), Some(span(0x10ff, 1)));
        assert_eq!(span(0x1000, 0x100).slice(0xff, 2), None);
        assert_eq!(span(0x1000, 0x100).slice(0, 0), None);
    }

    #[test]
    fn spans_print_start_and_size() {
        assert_eq!(span(0x4000_0000, 2 << 20).to_string(), "0x40000000+2M");
        assert_eq!(span(0x10, 1000).to_string(), "0x10+1000");
    }
}
