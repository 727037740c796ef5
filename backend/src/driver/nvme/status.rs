//! The status field of a completion, with the names of the specification.
//!
//! NVMe 2.0 §3.3.3.2.1; codes 80h and up of SCT 0 and 2: NVM Command Set 1.0 §3.1.2; codes B8h and up of SCT 1: ZNS Command
//! Set 1.1 §3.1.2.

use std::fmt;

use crate::driver::{Outcome, ZoneFault};

/// The status field of a completion without its phase bit: SC, SCT, CRD, M, DNR.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(u16);

impl Status {
    /// From the last 16 bits of a completion, including the phase bit.
    #[inline]
    pub(super) const fn from_word(word: u16) -> Self {
        Self(word >> 1)
    }

    /// SC.
    #[must_use]
    pub const fn code(self) -> u16 {
        self.0 & 0xff
    }

    /// SCT.
    #[must_use]
    pub const fn code_type(self) -> u16 {
        (self.0 >> 8) & 7
    }

    /// DNR: the command will fail again if retried.
    #[must_use]
    pub const fn do_not_retry(self) -> bool {
        self.0 & 1 << 14 != 0
    }

    /// True if the command succeeded.
    #[inline]
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// The status in terms of the [`Queue`](crate::driver::Queue) trait.
    #[inline]
    #[must_use]
    pub const fn outcome(self) -> Outcome {
        match (self.code_type(), self.code()) {
            (0, 0x00) => Outcome::Success,
            (0, 0x01 | 0x02) => Outcome::Unsupported,
            (1, 0xb8..=0xbb | 0xbf) => Outcome::Zone(ZoneFault::Invalid),
            (1, 0xbc) => Outcome::Zone(ZoneFault::WritePointer),
            (1, 0xbd) => Outcome::Zone(ZoneFault::TooManyActive),
            (1, 0xbe) => Outcome::Zone(ZoneFault::TooManyOpen),
            _ => Outcome::Failed,
        }
    }

    const fn name(self) -> Option<&'static str> {
        Some(match (self.code_type(), self.code()) {
            (0, 0x00) => "Successful Completion",
            (0, 0x01) => "Invalid Command Opcode",
            (0, 0x02) => "Invalid Field in Command",
            (0, 0x03) => "Command ID Conflict",
            (0, 0x04) => "Data Transfer Error",
            (0, 0x05) => "Commands Aborted due to Power Loss Notification",
            (0, 0x06) => "Internal Error",
            (0, 0x07) => "Command Abort Requested",
            (0, 0x08) => "Command Aborted due to SQ Deletion",
            (0, 0x0b) => "Invalid Namespace or Format",
            (0, 0x0c) => "Command Sequence Error",
            (0, 0x13) => "PRP Offset Invalid",
            (0, 0x15) => "Operation Denied",
            (0, 0x1d) => "Sanitize In Progress",
            (0, 0x20) => "Namespace is Write Protected",
            (0, 0x21) => "Command Interrupted",
            (0, 0x22) => "Transient Transport Error",
            (0, 0x24) => "Admin Command Media Not Ready",
            (0, 0x80) => "LBA Out of Range",
            (0, 0x81) => "Capacity Exceeded",
            (0, 0x82) => "Namespace Not Ready",
            (0, 0x83) => "Reservation Conflict",
            (0, 0x84) => "Format In Progress",
            (1, 0x00) => "Completion Queue Invalid",
            (1, 0x01) => "Invalid Queue Identifier",
            (1, 0x02) => "Invalid Queue Size",
            (1, 0x08) => "Invalid Interrupt Vector",
            (1, 0x0c) => "Invalid Queue Deletion",
            (1, 0x80) => "Conflicting Attributes",
            (1, 0x82) => "Attempted Write to Read Only Range",
            (1, code @ 0xb8..=0xbf) => zone_name(code),
            (2, 0x80) => "Write Fault",
            (2, 0x81) => "Unrecovered Read Error",
            (2, 0x82) => "End-to-end Guard Check Error",
            (2, 0x86) => "Access Denied",
            (2, 0x87) => "Deallocated or Unwritten Logical Block",
            (3, 0x00) => "Internal Path Error",
            (3, 0x01) => "Asymmetric Access Persistent Loss",
            (3, 0x02) => "Asymmetric Access Inaccessible",
            (3, 0x03) => "Asymmetric Access Transition",
            _ => return None,
        })
    }
}

/// The status codes of the Zoned Namespace command set, B8h to BFh. ZNS Command Set 1.1 §3.1.2
const fn zone_name(code: u16) -> &'static str {
    match code {
        0xb8 => "Zone Boundary Error",
        0xb9 => "Zone Is Full",
        0xba => "Zone Is Read Only",
        0xbb => "Zone Is Offline",
        0xbc => "Zone Invalid Write",
        0xbd => "Too Many Active Zones",
        0xbe => "Too Many Open Zones",
        _ => "Invalid Zone State Transition",
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().unwrap_or("status");
        write!(f, "{name} (SCT {:x}h, SC {:02x}h", self.code_type(), self.code())?;
        f.write_str(if self.do_not_retry() { ", do not retry)" } else { ")" })
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code_type: u16, code: u16) -> Status {
        Status::from_word((code_type << 8 | code) << 1 | 1)
    }

    #[test]
    fn the_phase_bit_is_not_part_of_the_status() {
        assert_eq!(Status::from_word(1).outcome(), Outcome::Success);
        assert_eq!(Status::from_word(0).outcome(), Outcome::Success);
    }

    #[test]
    fn retry_and_more_bits_do_not_make_a_success_fail() {
        let more_and_retry_delay = Status::from_word(0b0111 << 12);
        assert!(more_and_retry_delay.is_success());
        assert_eq!(more_and_retry_delay.outcome(), Outcome::Success);
    }

    #[test]
    fn invalid_opcodes_and_fields_are_unsupported_and_all_other_errors_are_failures() {
        assert_eq!(status(0, 1).outcome(), Outcome::Unsupported);
        assert_eq!(status(0, 2).outcome(), Outcome::Unsupported);
        assert_eq!(status(0, 6).outcome(), Outcome::Failed);
        assert_eq!(status(1, 1).outcome(), Outcome::Failed);
        assert_eq!(status(7, 0).outcome(), Outcome::Failed, "vendor specific zero is not success");
    }

    #[test]
    fn errors_of_zones_tell_what_the_driver_of_the_zone_did_wrong() {
        let fault = |code| status(1, code).outcome();
        for code in [0xb8, 0xb9, 0xba, 0xbb, 0xbf] {
            assert_eq!(fault(code), Outcome::Zone(ZoneFault::Invalid), "{code:x}");
        }
        assert_eq!(fault(0xbc), Outcome::Zone(ZoneFault::WritePointer));
        assert_eq!(fault(0xbd), Outcome::Zone(ZoneFault::TooManyActive));
        assert_eq!(fault(0xbe), Outcome::Zone(ZoneFault::TooManyOpen));
        assert_eq!((fault(0xb7), fault(0xc0)), (Outcome::Failed, Outcome::Failed));
        assert_eq!(status(0, 0xbc).outcome(), Outcome::Failed, "of another type");
    }

    #[test]
    fn statuses_print_name_and_number() {
        assert_eq!(status(2, 0x81).to_string(), "Unrecovered Read Error (SCT 2h, SC 81h)");
        assert_eq!(status(7, 0x33).to_string(), "status (SCT 7h, SC 33h)");
        let final_word = Status::from_word(0x8000 | 0x80 << 1);
        assert_eq!(final_word.to_string(), "LBA Out of Range (SCT 0h, SC 80h, do not retry)");
    }
}
