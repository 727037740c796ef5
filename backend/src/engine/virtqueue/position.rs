//! A position in a packed ring (virtio 1.2 §2.8.1), and the bases that the front-end sends.

/// The wrap counter in a `desc_event_off_wrap` (virtio 1.2 §2.8.14), and in each half of a base (vhost-user: "Vring
/// descriptor indices for packed virtqueues").
const WRAP: u16 = 1 << 15;

/// A position in the ring, with its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Index of the descriptor.
    pub slot: u16,
    /// True in every other round, from the first on.
    pub wrap: bool,
}

impl Position {
    /// Decodes `desc_event_off_wrap` or half of a base. `None` if the ring is too short.
    #[inline]
    #[must_use]
    pub fn from_raw(raw: u16, size: u16) -> Option<Self> {
        let slot = raw & !WRAP;
        (slot < size).then_some(Self { slot, wrap: raw & WRAP != 0 })
    }

    /// As in `desc_event_off_wrap`: the wrap counter is the top bit.
    #[inline]
    #[must_use]
    pub fn raw(self) -> u16 {
        self.slot | if self.wrap { WRAP } else { 0 }
    }

    /// The position `by` descriptors later; `by` ≤ `size`.
    #[inline]
    #[must_use]
    pub fn advance(self, by: u16, size: u16) -> Self {
        let slot = self.slot + by;
        if slot < size { Self { slot, ..self } } else { Self { slot: slot - size, wrap: !self.wrap } }
    }

    /// How many descriptors `later` is ahead, modulo two rounds.
    #[inline]
    #[must_use]
    pub fn distance(self, later: Self, size: u16) -> u16 {
        match (self.wrap == later.wrap, later.slot >= self.slot) {
            (true, true) => later.slot - self.slot,
            (true, false) => 2 * size - (self.slot - later.slot),
            (false, _) => size + later.slot - self.slot,
        }
    }
}

/// Decodes a base: next available and next used (vhost-user: "Vring descriptor indices for packed virtqueues"). DPDK leaves the
/// upper half zero. Both positions are then equal, because a stopped ring has returned all its chains.
pub(super) fn positions(base: u32, size: u16) -> Option<(Position, Position)> {
    let [a, b, c, d] = base.to_le_bytes();
    let (avail, used) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let next_avail = Position::from_raw(avail, size)?;
    let next_used = if used == 0 { next_avail } else { Position::from_raw(used, size)? };
    (next_used.distance(next_avail, size) <= size).then_some((next_avail, next_used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_repeat_after_two_rounds() {
        for size in [1, 2, 3, 7, 1024] {
            let start = Position { slot: 0, wrap: true };
            let mut at = start;
            for step in 0..2 * size {
                assert_eq!(start.distance(at, size), step, "size {size}");
                assert_eq!(Position::from_raw(at.raw(), size), Some(at));
                for by in [0, 1, size / 2, size] {
                    assert_eq!(at.distance(at.advance(by, size), size), by, "size {size} at {at:?}");
                }
                at = at.advance(1, size);
            }
            assert_eq!(at, start);
        }
    }

    #[test]
    fn a_base_has_both_positions_or_only_the_first() {
        let at = |slot, wrap| Position { slot, wrap };
        for (base, expected) in [
            (0x8000_8000, Some((at(0, true), at(0, true)))),
            (0x8003_0001, Some((at(1, false), at(3, true)))),
            (0x0000_8000, Some((at(0, true), at(0, true)))), // DPDK at the start
            (0x0000_0004, Some((at(4, false), at(4, false)))),
            (0x8001_8001, Some((at(1, true), at(1, true)))),
            (0x8000_8005, None), // no such descriptor
            (0x8005_8000, None),
            (0x8001_8000, None), // used overtakes available
        ] {
            assert_eq!(positions(base, 5), expected, "{base:#x}");
        }
    }
}
