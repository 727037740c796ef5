//! Options of a zoned namespace.

use super::{EmulatedError, units};

/// The zones of the emulated namespace. Zero: no limit; a size of zero: no zones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZoneOptions {
    /// Bytes of a zone; whole blocks.
    pub size: u64,
    /// Bytes of it that can be written; by default all.
    pub capacity: u64,
    /// MOR: most open zones.
    pub max_open: u32,
    /// MAR: most active zones.
    pub max_active: u32,
    /// ZASL: an append has at most `4096 << append_limit` bytes; 0: as many as a transfer.
    pub append_limit: u8,
}

/// The names that [`ZoneOptions::set`] accepts.
pub(super) const NAMES: &str = "zone-size, zone-capacity, max-open, max-active, zasl";

impl ZoneOptions {
    /// Bytes of a zone that can be written.
    pub(super) fn capacity(&self) -> u64 {
        if self.capacity == 0 { self.size } else { self.capacity }
    }

    /// Sets the option `name`. False if there is none of that name.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<bool, EmulatedError> {
        let number = |option| value.parse().map_err(|_| error(option, "a whole number", value));
        let bytes = |option| units::size(value).ok_or_else(|| error(option, "bytes, optionally with suffix", value));
        match name {
            "zone-size" => self.size = bytes("zone-size")?,
            "zone-capacity" => self.capacity = bytes("zone-capacity")?,
            "max-open" => self.max_open = number("max-open")?,
            "max-active" => self.max_active = number("max-active")?,
            "zasl" => self.append_limit = value.parse().map_err(|_| error("zasl", "0 to 255", value))?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Checks the sizes against a block of `lba` bytes.
    pub(super) fn check(&self, lba: u32) -> Result<(), EmulatedError> {
        let check = |valid: bool, option, wanted, found| {
            if valid { Ok(()) } else { Err(EmulatedError::Option { option, wanted, found }) }
        };
        let whole = |bytes: u64| bytes.is_multiple_of(lba.into());
        check(whole(self.size), "zone-size", "whole logical blocks", self.size)?;
        let fits = whole(self.capacity) && self.capacity <= self.size;
        check(fits, "zone-capacity", "whole logical blocks, at most a zone", self.capacity)
    }
}

fn error(option: &'static str, wanted: &'static str, found: &str) -> EmulatedError {
    EmulatedError::Value { option, wanted, found: found.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulated::Options;

    #[test]
    fn a_zone_size_makes_the_namespace_zoned() {
        let line = "size=8M,zone-size=1M,zone-capacity=512K,max-open=3,max-active=5,zasl=2";
        let options: Options = line.parse().unwrap();
        let wanted = ZoneOptions { size: 1 << 20, capacity: 512 << 10, max_open: 3, max_active: 5, append_limit: 2 };
        assert_eq!((options.zones, options.command_set), (wanted, Some(2)));
        let options: Options = "size=8M".parse().unwrap();
        assert_eq!((options.zones, options.command_set), (ZoneOptions::default(), None));
    }

    #[test]
    fn zones_of_no_whole_blocks_are_refused() {
        for (line, part) in [
            ("zone-size=1000", "zone-size: wanted whole logical blocks"),
            ("zone-size=1M,zone-capacity=2M", "zone-capacity: wanted whole"),
            ("zone-size=1M,zone-capacity=100", "zone-capacity: wanted whole"),
            ("max-open=x", "max-open=x: wanted a whole number"),
        ] {
            let error = line.parse::<Options>().unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
