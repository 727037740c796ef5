//! Numbers with units, in options and fault files.

use std::time::Duration;

/// A whole number followed by a unit: the first in `units` that is a suffix of `text`.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (digits, scale) = units.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale)))?;
    digits.parse::<u64>().ok()?.checked_mul(scale)
}

/// A size in bytes; the suffixes K, M, G and T are powers of 1024.
pub(super) fn size(text: &str) -> Option<u64> {
    scaled(text, &[("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40), ("", 1)])
}

/// A duration with unit ns, us, ms or s.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let units = [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];
    scaled(text, &units).map(Duration::from_nanos)
}
