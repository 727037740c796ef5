//! What distinguishes drives: limits and preferences that a controller reports, and the ways in which some misbehave.

use std::str::FromStr;
use std::time::Duration;

use super::{EmulatedError, units};

/// Asymmetric Namespace Access state (NVMe 2.0 §8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AnaState {
    /// The preferred path.
    Optimized = 1,
    /// A slower path.
    NonOptimized = 2,
    /// The namespace cannot be reached by this controller, but by another.
    Inaccessible = 3,
    /// It cannot be reached any more.
    PersistentLoss = 4,
    /// The state is about to change.
    Change = 15,
}

impl AnaState {
    pub(super) fn from_u8(state: u8) -> Option<Self> {
        [Self::Optimized, Self::NonOptimized, Self::Inaccessible, Self::PersistentLoss, Self::Change]
            .into_iter()
            .find(|known| *known as u8 == state)
    }
}

/// Whether the controller has a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Support {
    /// It has.
    #[default]
    Yes,
    /// It has not, and says so.
    No,
    /// It says that it has, and refuses it.
    Broken,
}

/// Limits, preferences and misbehaviours. Zero: no limit, not reported.
#[derive(Clone, Debug, Default)]
pub struct Traits {
    /// Metadata bytes of each block, in a buffer of their own. They are not stored: ones are read, zeroes must be written.
    pub metadata: u16,
    /// NOIOB: a command should not cross a multiple of this many blocks. This controller refuses one that does.
    pub io_boundary: u16,
    /// NPWG: preferred write granularity, blocks.
    pub write_granularity: u16,
    /// NPWA: preferred write alignment, blocks.
    pub write_alignment: u16,
    /// NOWS: optimal write size, blocks.
    pub write_size: u16,
    /// NAWUPF: blocks written atomically when power fails.
    pub atomic_blocks: u16,
    /// NABO: the block at which the first atomic boundary is.
    pub atomic_offset: u16,
    /// WZSL: a Write Zeroes command has at most `4096 << wzsl` bytes.
    pub zeroes_limit: u8,
    /// DMRL: ranges of a Dataset Management command.
    pub discard_ranges: u8,
    /// DMRSL: blocks in one of its ranges.
    pub discard_range_blocks: u32,
    /// DMSL: blocks in all of them.
    pub discard_blocks: u64,
    /// Write Zeroes.
    pub write_zeroes: Support,
    /// Dataset Management.
    pub deallocate: Support,
    /// The controller has a memory buffer (CMB), and its address range is on from before: accesses to it are not DMA.
    pub memory_buffer: bool,
    /// State of the path, if the controller reports it.
    pub ana: Option<AnaState>,
    /// How long all registers read as ones after CC.EN has changed.
    pub ready_delay: Duration,
    /// Command identifiers are shared by all queues, and below the number of queue entries.
    pub shared_tags: bool,
}

/// The names that [`Traits::set`] accepts.
pub(super) const NAMES: &str = "metadata, noiob, npwg, npwa, nows, nawupf, nabo, wzsl, dmrl, dmrsl, dmsl, write-zeroes, \
                                deallocate, cmb, ana, ready-delay, shared-tags";

impl Traits {
    /// Sets the trait `name`. False if there is none of that name.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<bool, EmulatedError> {
        match name {
            "metadata" => self.metadata = number("metadata", value)?,
            "noiob" => self.io_boundary = number("noiob", value)?,
            "npwg" => self.write_granularity = number("npwg", value)?,
            "npwa" => self.write_alignment = number("npwa", value)?,
            "nows" => self.write_size = number("nows", value)?,
            "nawupf" => self.atomic_blocks = number("nawupf", value)?,
            "nabo" => self.atomic_offset = number("nabo", value)?,
            "wzsl" => self.zeroes_limit = number("wzsl", value)?,
            "dmrl" => self.discard_ranges = number("dmrl", value)?,
            "dmrsl" => self.discard_range_blocks = number("dmrsl", value)?,
            "dmsl" => self.discard_blocks = number("dmsl", value)?,
            "write-zeroes" => self.write_zeroes = support("write-zeroes", value)?,
            "deallocate" => self.deallocate = support("deallocate", value)?,
            "cmb" => self.memory_buffer = one_of("cmb", value, "on or off", &[("on", true), ("off", false)])?,
            "ana" => self.ana = Some(ana(value)?),
            "ready-delay" => self.ready_delay = delay(value)?,
            "shared-tags" => {
                self.shared_tags = one_of("shared-tags", value, "on or off", &[("on", true), ("off", false)])?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// True if the namespace reports preferences (NSFEAT.OPTPERF).
    pub(super) fn reports_preferences(&self) -> bool {
        self.write_granularity != 0 || self.write_alignment != 0 || self.write_size != 0
    }
}

fn error(option: &'static str, wanted: &'static str, found: &str) -> EmulatedError {
    EmulatedError::Value { option, wanted, found: found.to_owned() }
}

fn number<T: FromStr>(option: &'static str, text: &str) -> Result<T, EmulatedError> {
    text.parse().map_err(|_| error(option, "a small whole number", text))
}

fn one_of<T: Copy>(
    option: &'static str,
    text: &str,
    wanted: &'static str,
    values: &[(&str, T)],
) -> Result<T, EmulatedError> {
    let found = values.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| error(option, wanted, text))
}

fn support(option: &'static str, text: &str) -> Result<Support, EmulatedError> {
    let values = [("on", Support::Yes), ("off", Support::No), ("broken", Support::Broken)];
    one_of(option, text, "on, off or broken", &values)
}

fn ana(text: &str) -> Result<AnaState, EmulatedError> {
    let values = [
        ("optimized", AnaState::Optimized),
        ("non-optimized", AnaState::NonOptimized),
        ("inaccessible", AnaState::Inaccessible),
        ("persistent-loss", AnaState::PersistentLoss),
        ("change", AnaState::Change),
    ];
    one_of("ana", text, "optimized, non-optimized, inaccessible, persistent-loss or change", &values)
}

fn delay(text: &str) -> Result<Duration, EmulatedError> {
    units::duration(text).ok_or_else(|| error("ready-delay", "a number with unit ns, us, ms or s", text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulated::Options;

    #[test]
    fn each_name_sets_its_trait() {
        let line = "metadata=8,noiob=1,npwg=2,npwa=3,nows=4,nawupf=5,nabo=6,wzsl=7,dmrl=8,dmrsl=9,dmsl=10,write-zeroes=broken,\
                    deallocate=off,cmb=on,ana=change,ready-delay=2ms,shared-tags=on";
        let options: Options = line.parse().unwrap();
        let t = options.traits;
        assert_eq!(t.metadata, 8);
        assert_eq!([t.io_boundary, t.write_granularity, t.write_alignment, t.write_size], [1, 2, 3, 4]);
        assert_eq!((t.atomic_blocks, t.atomic_offset, t.zeroes_limit, t.discard_ranges), (5, 6, 7, 8));
        assert_eq!((t.discard_range_blocks, t.discard_blocks), (9, 10));
        assert_eq!((t.write_zeroes, t.deallocate), (Support::Broken, Support::No));
        assert_eq!((t.memory_buffer, t.ana, t.shared_tags), (true, Some(AnaState::Change), true));
        assert_eq!(t.ready_delay, Duration::from_millis(2));
        let names: Vec<_> = NAMES.split(", ").map(str::trim).collect();
        assert!(line.split(',').all(|pair| names.contains(&pair.split('=').next().unwrap().trim())));
    }

    #[test]
    fn a_value_that_is_none_names_its_trait() {
        for (text, part) in [("ana=lost", "ana=lost: wanted optimized"), ("cmb=1", "cmb=1: wanted on or off")] {
            let error = text.parse::<Options>().expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
