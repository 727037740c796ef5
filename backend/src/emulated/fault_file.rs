//! Reads a fault file (TOML) with one `[[fault]]` entry per fault. `faults.toml` in this directory shows all of them.
//!
//! Each entry is first read into one flat structure and then interpreted according to its effect. A key that does not belong
//! to the effect is an error that names the key, just like an unknown key.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::units::{duration, size};
use super::wire::{Status, nvm};
use super::{Commands, Effect, EmulatedError, Fault};

const EFFECTS: &str = "lose, twice, wrong-phase, wrong-id, status, delay, lose-interrupt, stick, fatal, remove, resize, \
                       stuck-ready, reset-refused, removed, capability, identify";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    fault: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    effect: String,
    queue: Option<u16>,
    opcode: Option<Opcode>,
    skip: Option<u64>,
    times: Option<u64>,
    status: Option<u16>,
    id: Option<u16>,
    delay: Option<String>,
    size: Option<String>,
    value: Option<String>,
    cns: Option<u8>,
    offset: Option<usize>,
    bytes: Option<Vec<u8>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Opcode {
    Number(u8),
    Name(String),
}

/// Reads the faults in the file at `path`.
pub(super) fn read(path: &Path) -> Result<Vec<Fault>, EmulatedError> {
    let failed = |reason| EmulatedError::Faults { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    parse(&text).map_err(failed)
}

fn parse(text: &str) -> Result<Vec<Fault>, String> {
    let List { fault } = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        format!("line {line}: {}", error.message().replace('\n', "; "))
    })?;
    let numbered = (1..).zip(fault);
    numbered.map(|(n, entry)| entry.fault().map_err(|reason| format!("fault {n}: {reason}"))).collect()
}

impl Entry {
    fn fault(mut self) -> Result<Fault, String> {
        let effect = std::mem::take(&mut self.effect);
        let fault = match effect.as_str() {
            "stuck-ready" => Fault::StuckReady,
            "reset-refused" => Fault::ResetRefused,
            "removed" => Fault::Removed,
            "capability" => Fault::Capability(hexadecimal(&needed(self.value.take(), "value")?)?),
            "identify" => Fault::Identify {
                cns: needed(self.cns.take(), "cns")?,
                offset: needed(self.offset.take(), "offset")?,
                bytes: needed(self.bytes.take(), "bytes")?,
            },
            _ => self.command_fault(&effect)?,
        };
        match self.unused_key() {
            Some(name) => Err(format!("`{name}` does not belong to effect `{effect}`")),
            None => Ok(fault),
        }
    }

    fn command_fault(&mut self, effect: &str) -> Result<Fault, String> {
        let effect = match effect {
            "lose" => Effect::Lose,
            "twice" => Effect::Twice,
            "wrong-phase" => Effect::WrongPhase,
            "wrong-id" => Effect::WrongId(needed(self.id.take(), "id")?),
            "status" => Effect::Status(status(needed(self.status.take(), "status")?)?),
            "delay" => Effect::Delay(time(&needed(self.delay.take(), "delay")?)?),
            "lose-interrupt" => Effect::LoseInterrupt,
            "stick" => Effect::Stick,
            "fatal" => Effect::Fatal,
            "remove" => Effect::Remove,
            "resize" => Effect::Resize(bytes(&needed(self.size.take(), "size")?)?),
            _ => return Err(format!("unknown effect `{effect}`; the effects are {EFFECTS}")),
        };
        let opcode = self.opcode.take().map(|opcode| opcode.number()).transpose()?;
        let times = match self.times.take() {
            None => 1,
            Some(0) => u64::MAX,
            Some(times) => times,
        };
        let on = Commands { queue: self.queue.take(), opcode };
        Ok(Fault::Command { on, skip: self.skip.take().unwrap_or(0), times, effect })
    }

    /// The first key that the effect does not use.
    fn unused_key(&self) -> Option<&'static str> {
        let keys = [
            ("queue", self.queue.is_some()),
            ("opcode", self.opcode.is_some()),
            ("skip", self.skip.is_some()),
            ("times", self.times.is_some()),
            ("status", self.status.is_some()),
            ("id", self.id.is_some()),
            ("delay", self.delay.is_some()),
            ("size", self.size.is_some()),
            ("value", self.value.is_some()),
            ("cns", self.cns.is_some()),
            ("offset", self.offset.is_some()),
            ("bytes", self.bytes.is_some()),
        ];
        keys.into_iter().find(|(_, present)| *present).map(|(name, _)| name)
    }
}

impl Opcode {
    fn number(&self) -> Result<u8, String> {
        match self {
            Self::Number(number) => Ok(*number),
            Self::Name(name) => match name.as_str() {
                "read" => Ok(nvm::READ),
                "write" => Ok(nvm::WRITE),
                "flush" => Ok(nvm::FLUSH),
                "write-zeroes" => Ok(nvm::WRITE_ZEROES),
                "dataset-management" => Ok(nvm::DATASET_MANAGEMENT),
                _ => Err(format!(
                    "unknown opcode `{name}`; give a number, or read, write, flush, write-zeroes or dataset-management"
                )),
            },
        }
    }
}

fn needed<T>(value: Option<T>, name: &str) -> Result<T, String> {
    value.ok_or_else(|| format!("`{name}` is missing"))
}

/// Status code type in bits 10:8, status code in bits 7:0 (NVMe 2.0 §3.3.3.2.1).
fn status(bits: u16) -> Result<Status, String> {
    match bits.to_le_bytes() {
        [0, 0] => Err("status 0 is success".to_owned()),
        [code, kind @ 0..8] => Ok(Status::new(kind, code)),
        _ => Err(format!("status {bits:#x} does not fit 11 bits")),
    }
}

fn time(text: &str) -> Result<Duration, String> {
    duration(text).ok_or_else(|| format!("delay `{text}`: wanted a number with unit ns, us, ms or s"))
}

fn bytes(text: &str) -> Result<u64, String> {
    size(text).ok_or_else(|| format!("size `{text}`: wanted bytes, optionally with suffix K, M, G or T"))
}

/// A 64-bit register value. TOML integers are signed, so the file gives it as text.
fn hexadecimal(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
    digits
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| format!("value `{text}`: wanted hexadecimal text such as \"0x0020ffffff\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_names_every_effect() {
        let example = include_str!("faults.toml");
        let faults = parse(example).unwrap();
        assert_eq!(faults.len(), EFFECTS.split(", ").count());
        for effect in EFFECTS.split(", ") {
            assert!(example.contains(&format!("effect = \"{effect}\"")), "{effect}");
        }
        let third_read = Commands { queue: Some(1), opcode: Some(nvm::READ) };
        assert_eq!(faults[0], Fault::Command { on: third_read, skip: 2, times: 1, effect: Effect::Lose });
    }

    #[test]
    fn times_zero_affects_all_commands() {
        let faults = parse("[[fault]]\neffect = \"twice\"\ntimes = 0").unwrap();
        assert_eq!(faults, [Fault::always(Commands::default(), Effect::Twice)]);
    }

    #[test]
    fn errors_are_one_line_that_says_where() {
        for (text, message) in [
            ("effect = \"loose\"", "fault 1: unknown effect `loose`; the effects are lose, twice"),
            ("effect = \"lose\"\nopcode = \"raed\"", "fault 1: unknown opcode `raed`; give a number, or read, write"),
            ("effect = \"lose\"\nid = 3", "fault 1: `id` does not belong to effect `lose`"),
            ("effect = \"removed\"\nskip = 3", "fault 1: `skip` does not belong to effect `removed`"),
            ("effect = \"wrong-id\"", "fault 1: `id` is missing"),
            ("effect = \"status\"\nstatus = 0", "fault 1: status 0 is success"),
            ("effect = \"status\"\nstatus = 0x800", "fault 1: status 0x800 does not fit"),
            ("effect = \"delay\"\ndelay = \"5\"", "fault 1: delay `5`: wanted a number with unit ns"),
            ("effect = \"capability\"\nvalue = \"12\"", "fault 1: value `12`: wanted hexadecimal text such as"),
            ("effect = \"lose\"\ncolour = 3", "line 3: unknown field `colour`"),
            ("effect = ", "line 2: "),
            ("", "line 1: missing field `effect`"),
        ] {
            let error = parse(&format!("[[fault]]\n{text}")).expect_err(text);
            assert!(error.starts_with(message) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
