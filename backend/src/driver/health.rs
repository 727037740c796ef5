//! What a device says of itself and of its health, for an operator.

use serde::Serialize;

/// Who the device is, as it was found when it was brought up last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Identification {
    /// Model, ASCII without padding.
    pub model: String,
    /// Serial number, ASCII without padding.
    pub serial: String,
    /// Firmware revision, ASCII without padding.
    pub firmware: String,
    /// Namespace identifier.
    pub namespace: u32,
    /// NGUID in hexadecimal digits; empty if the namespace has none.
    pub nguid: String,
    /// EUI64 in hexadecimal digits; empty if the namespace has none.
    pub eui64: String,
    /// Size of the disk, logical blocks.
    pub blocks: u64,
    /// Size of a logical block, bytes.
    pub block_bytes: u32,
    /// Queue pairs in use.
    pub queues: u16,
    /// True if the device has a write cache that loses its contents on power loss.
    pub volatile_cache: bool,
}

impl Identification {
    /// True if `id` is the serial number, the NGUID or the EUI64. Hexadecimal digits may have dashes, colons and upper case.
    #[must_use]
    pub fn is(&self, id: &str) -> bool {
        let digits = id.trim_start_matches("0x").replace(['-', ':'], "").to_lowercase();
        let is_identifier = |known: &str| !known.is_empty() && known == digits;
        !self.serial.is_empty() && self.serial == id || is_identifier(&self.nguid) || is_identifier(&self.eui64)
    }
}

/// SMART / Health Information (NVMe 2.0 §5.16.1.3). Counters of 128 bits that exceed 64 are cut to the highest value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Critical Warning: bit 0 spare, 1 temperature, 2 reliability, 3 read-only, 4 backup of volatile memory.
    pub critical_warning: u8,
    /// Composite Temperature, kelvin.
    pub temperature_kelvin: u16,
    /// Available Spare, per cent.
    pub available_spare_percent: u8,
    /// Available Spare Threshold, per cent.
    pub available_spare_threshold_percent: u8,
    /// Percentage Used: an estimate of the life used, per cent; may exceed 100.
    pub used_percent: u8,
    /// Data Units Read, thousands of 512 bytes.
    pub data_units_read: u64,
    /// Data Units Written, thousands of 512 bytes.
    pub data_units_written: u64,
    /// Host Read Commands.
    pub host_reads: u64,
    /// Host Write Commands.
    pub host_writes: u64,
    /// Controller Busy Time, minutes.
    pub busy_minutes: u64,
    /// Power Cycles.
    pub power_cycles: u64,
    /// Power On Hours.
    pub power_on_hours: u64,
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: u64,
    /// Media and Data Integrity Errors.
    pub media_errors: u64,
    /// Number of Error Information Log Entries.
    pub error_log_entries: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_serial_number_or_one_of_its_identifiers() {
        let text = str::to_owned;
        let disk = Identification {
            model: text("M"),
            serial: text("S1"),
            nguid: text("00112233445566778899aabbccddeeff"),
            ..Identification::default()
        };
        for id in ["S1", "00112233445566778899aabbccddeeff", "0x00112233-4455-6677-8899-AABBCCDDEEFF"] {
            assert!(disk.is(id), "{id}");
        }
        for id in ["", "s1", "S", "M", "0011", "0x", "--"] {
            assert!(!disk.is(id), "{id}");
        }
    }
}
