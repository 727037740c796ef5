//! Options of the emulated function, set from Rust or parsed from text such as
//! `size=4G,lba=4096,queues=2,medium=null,mode=threaded`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{Iova, Span};

use super::{
    EmulatedError, Fault, Medium, Order, Traits, ZoneOptions, fault_file, namespaces, traits, units, zone_options,
};

/// When commands run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A doorbell write executes the new commands on the writing thread before it returns.
    Inline,
    /// The controller's own thread executes commands some time after the doorbell write.
    Threaded,
}

/// Options of the emulated function.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of each namespace in bytes; a multiple of `lba`. Zero means that they share an existing file.
    pub size: u64,
    /// Number of namespaces, which are equal parts of the medium: 1 to 128.
    pub namespaces: u16,
    /// Logical block size in bytes: 512 or 4096.
    pub lba: u32,
    /// Maximum number of I/O queue pairs.
    pub queues: u16,
    /// Maximum number of entries of an I/O queue (CAP.MQES + 1).
    pub queue_entries: u16,
    /// MDTS: the largest transfer is `4096 << mdts` bytes; 0 means no limit.
    pub mdts: u8,
    /// True if I/O commands may use Scatter Gather Lists.
    pub sgl: bool,
    /// CAP.DSTRD: doorbells are `4 << doorbell_stride` bytes apart.
    pub doorbell_stride: u8,
    /// Storage of the disk's blocks.
    pub medium: Medium,
    /// The open file of the medium, which another process hands over; it is locked, so it is not opened again.
    pub adopted: Option<Arc<File>>,
    /// True if the controller has a volatile write cache, which is then enabled by default.
    pub volatile_cache: bool,
    /// When commands run.
    pub mode: Mode,
    /// Duration of each I/O command. In inline mode only [`Machine::advance`](super::Machine::advance) moves the clock, so
    /// commands stay in flight until then.
    pub latency: Duration,
    /// The order in which I/O commands complete. A random one needs a latency.
    pub order: Order,
    /// Limits, preferences and misbehaviours.
    pub traits: Traits,
    /// Command Set Identifier of the namespace: 0 NVM, 1 key-value, 2 zoned, ...; `None` for a controller that supports the NVM
    /// command set only and does not report identifiers. Commands are executed as those of the NVM command set, or on `zones`.
    pub command_set: Option<u8>,
    /// The zones, of a namespace with command set 2.
    pub zones: ZoneOptions,
    /// Number of MSI-X vectors, 0 for none; by default one more than `queues`.
    pub vectors: Option<u16>,
    /// Number of MSI vectors: 0 for none, or a power of two up to 32.
    pub msi: u16,
    /// True if the function has INTA#.
    pub intx: bool,
    /// False suppresses all interrupts, for measurements of a driver that only polls.
    pub interrupts: bool,
    /// Address width of the IOMMU in bits. Five-level page tables give 57.
    pub address_width: u8,
    /// IOVA ranges that the platform reserves.
    pub reserved: Vec<Span<Iova>>,
    /// True if Enable No Snoop is writable and set at power-on; false if it is hardwired to zero.
    pub no_snoop: bool,
    /// True if the IOMMU overrides No Snoop. If false, CPU caches and DRAM are modelled separately: a function that sets No
    /// Snoop sees only what was flushed with [`Machine::cache`](super::Machine::cache).
    pub snoop_enforced: bool,
    /// Faults that are active from the start.
    pub faults: Vec<Fault>,
    /// Serial number, at most 20 ASCII characters.
    pub serial: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            size: 1 << 30,
            namespaces: 1,
            lba: 512,
            queues: 4,
            queue_entries: 1024,
            mdts: 5,
            sgl: false,
            doorbell_stride: 0,
            medium: Medium::Memory,
            adopted: None,
            volatile_cache: true,
            mode: Mode::Inline,
            latency: Duration::ZERO,
            order: Order::Fetched,
            traits: Traits::default(),
            command_set: None,
            zones: ZoneOptions::default(),
            vectors: None,
            msi: 0,
            intx: false,
            interrupts: true,
            address_width: 48,
            // The MSI window of x86 (Intel SDM vol. 3 §11.11.1).
            reserved: Span::new(Iova(0xfee0_0000), 1 << 20).into_iter().collect(),
            no_snoop: false,
            snoop_enforced: true,
            faults: Vec::new(),
            serial: "EMULATED-0".to_owned(),
        }
    }
}

impl Options {
    /// The medium is `file`, or memory of the default size if none is given.
    fn set_medium(&mut self, file: Option<Medium>) {
        match file {
            Some(file) => self.medium = file,
            None if self.size == 0 => self.size = Self::default().size,
            None => {}
        }
        if self.zones.size != 0 {
            self.command_set = Some(2);
        }
    }

    /// Checks all values before any file is opened.
    pub(super) fn check(&self) -> Result<(), EmulatedError> {
        let check = |valid: bool, option, wanted, found| {
            if valid { Ok(()) } else { Err(EmulatedError::Option { option, wanted, found }) }
        };
        let from_file = matches!(self.medium, Medium::File { .. });
        check(matches!(self.lba, 512 | 4096), "lba", "512 or 4096", self.lba.into())?;
        check(self.size != 0 || from_file, "size", "at least one logical block", self.size)?;
        check(self.size.is_multiple_of(self.lba.into()), "size", "a multiple of the logical block", self.size)?;
        let several = (1..=namespaces::MOST).contains(&self.namespaces);
        check(several, "namespaces", "1 to 128", self.namespaces.into())?;
        let zoned = self.zones.size != 0 && self.namespaces > 1;
        check(!zoned, "namespaces", "1 with zone-size", self.namespaces.into())?;
        check((1..=1023).contains(&self.queues), "queues", "1 to 1023", self.queues.into())?;
        check(self.queue_entries >= 2, "queue entries", "at least 2", self.queue_entries.into())?;
        check(self.mdts <= 15, "mdts", "0 to 15", self.mdts.into())?;
        check(self.doorbell_stride <= 8, "doorbell stride", "0 to 8", self.doorbell_stride.into())?;
        self.zones.check(self.lba)?;
        let latency_fits = self.order == Order::Fetched || !self.latency.is_zero();
        check(latency_fits, "latency", "more than 0 with order=random", 0)?;
        check((16..=57).contains(&self.address_width), "address width", "16 to 57", self.address_width.into())?;
        check(self.vectors() <= 2048, "vectors", "0 to 2048", self.vectors().into())?;
        let msi = self.msi == 0 || (self.msi.is_power_of_two() && self.msi <= 32);
        check(msi, "msi", "0, 1, 2, 4, 8, 16 or 32", self.msi.into())?;
        let serial_fits = self.serial.len() <= 20 && self.serial.is_ascii();
        check(serial_fits, "serial", "at most 20 ASCII characters", self.serial.len() as u64)
    }
}

/// The option names of [`Options::from_str`].
const NAMES: &str = "size, namespaces, lba, queues, entries, mdts, sgl, stride, medium, file, create, sparse, wcache, \
                     mode, latency, order, seed, command-set, vectors, msi, intx, interrupts, width, no-snoop, \
                     snoop-enforced, faults, serial";

impl FromStr for Options {
    type Err = EmulatedError;

    /// Parses comma-separated `name=value` pairs. Options that are not given have the value of [`Options::default`], except
    /// that the mode is [`Mode::Threaded`]. Sizes take the suffixes K, M, G and T; times need the unit ns, us, ms or s. With
    /// `file=` the size may be omitted. `create=on` creates a missing file, sparse unless `sparse=off`. `faults=` gives the
    /// path of a fault file; see `faults.toml` in this directory. `order=random` takes its times from `seed=` (default 1).
    fn from_str(text: &str) -> Result<Self, EmulatedError> {
        let mut options = Self { size: 0, mode: Mode::Threaded, ..Self::default() };
        let (mut file, mut create, mut sparse) = (None, false, true);
        let (mut random, mut seed) = (false, 1);
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "size" => options.size = disk_size(value)?,
                "namespaces" => options.namespaces = number("namespaces", value)?,
                "lba" => options.lba = number("lba", value)?,
                "queues" => options.queues = number("queues", value)?,
                "entries" => options.queue_entries = number("entries", value)?,
                "mdts" => options.mdts = number("mdts", value)?,
                "sgl" => options.sgl = switch("sgl", value)?,
                "stride" => options.doorbell_stride = number("stride", value)?,
                "medium" => options.medium = medium(value)?,
                "file" => file = Some(PathBuf::from(value)),
                "create" => create = switch("create", value)?,
                "sparse" => sparse = switch("sparse", value)?,
                "wcache" => options.volatile_cache = switch("wcache", value)?,
                "mode" => options.mode = mode(value)?,
                "latency" => options.latency = time("latency", value)?,
                "order" => random = order(value)?,
                "seed" => seed = number("seed", value)?,
                "command-set" => options.command_set = Some(number("command-set", value)?),
                "vectors" => options.vectors = Some(number("vectors", value)?),
                "msi" => options.msi = number("msi", value)?,
                "intx" => options.intx = switch("intx", value)?,
                "interrupts" => options.interrupts = switch("interrupts", value)?,
                "width" => options.address_width = number("width", value)?,
                "no-snoop" => options.no_snoop = no_snoop(value)?,
                "snoop-enforced" => options.snoop_enforced = switch("snoop-enforced", value)?,
                "faults" => options.faults = fault_file::read(Path::new(value))?,
                "serial" => value.clone_into(&mut options.serial),
                _ if options.traits.set(name, value)? || options.zones.set(name, value)? => {}
                _ => {
                    let known = format!("{NAMES}, {}, {}", traits::NAMES, zone_options::NAMES);
                    return Err(EmulatedError::Unknown { option: name.to_owned(), known });
                }
            }
        }
        options.set_medium(file.map(|path| Medium::File { path, create, sparse }));
        options.order = if random { Order::Random { seed } } else { Order::Fetched };
        options.check()?;
        Ok(options)
    }
}

fn value_error(option: &'static str, wanted: &'static str, found: &str) -> EmulatedError {
    EmulatedError::Value { option, wanted, found: found.to_owned() }
}

fn number<T: FromStr>(option: &'static str, text: &str) -> Result<T, EmulatedError> {
    text.parse().map_err(|_| value_error(option, "a small whole number", text))
}

fn switch(option: &'static str, text: &str) -> Result<bool, EmulatedError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(value_error(option, "on or off", text)),
    }
}

fn medium(text: &str) -> Result<Medium, EmulatedError> {
    match text {
        "memory" => Ok(Medium::Memory),
        "null" => Ok(Medium::Null),
        _ => Err(value_error("medium", "memory or null", text)),
    }
}

fn no_snoop(text: &str) -> Result<bool, EmulatedError> {
    match text {
        "never" => Ok(false),
        "controllable" => Ok(true),
        _ => Err(value_error("no-snoop", "never or controllable", text)),
    }
}

fn mode(text: &str) -> Result<Mode, EmulatedError> {
    match text {
        "inline" => Ok(Mode::Inline),
        "threaded" => Ok(Mode::Threaded),
        _ => Err(value_error("mode", "inline or threaded", text)),
    }
}

/// True if the order is random.
fn order(text: &str) -> Result<bool, EmulatedError> {
    match text {
        "fetched" => Ok(false),
        "random" => Ok(true),
        _ => Err(value_error("order", "fetched or random", text)),
    }
}

fn size(option: &'static str, text: &str) -> Result<u64, EmulatedError> {
    units::size(text).ok_or_else(|| value_error(option, "bytes, optionally with suffix K, M, G or T", text))
}

/// Refuses zero, which [`Options::size`] uses for an omitted size.
fn disk_size(text: &str) -> Result<u64, EmulatedError> {
    match size("size", text)? {
        0 => Err(value_error("size", "at least one logical block", text)),
        bytes => Ok(bytes),
    }
}

fn time(option: &'static str, text: &str) -> Result<Duration, EmulatedError> {
    units::duration(text).ok_or_else(|| value_error(option, "a number with unit ns, us, ms or s", text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_parsed_from_one_line() {
        let options: Options =
            "size=4G,lba=4096,queues=2,medium=null,mode=inline,latency=80us,wcache=off".parse().unwrap();
        assert_eq!((options.size, options.lba, options.queues), (4 << 30, 4096, 2));
        assert_eq!((options.medium, options.mode), (Medium::Null, Mode::Inline));
        assert_eq!((options.latency, options.volatile_cache), (Duration::from_micros(80), false));
    }

    #[test]
    fn a_random_order_has_a_seed_and_needs_a_latency() {
        let order = |text: &str| text.parse::<Options>().map(|options| options.order);
        assert_eq!(order("order=random,latency=1us").unwrap(), Order::Random { seed: 1 });
        assert_eq!(order("seed=9,order=random,latency=1us").unwrap(), Order::Random { seed: 9 });
        assert_eq!(order("order=fetched,seed=9").unwrap(), Order::Fetched);
        assert!(order("order=random").unwrap_err().to_string().contains("latency: wanted more than 0"));
    }

    #[test]
    fn an_empty_line_gives_the_defaults() {
        let options: Options = "".parse().unwrap();
        assert_eq!((options.size, options.medium, options.mode), (1 << 30, Medium::Memory, Mode::Threaded));
    }

    #[test]
    fn with_a_file_the_size_may_be_omitted() {
        let options: Options = "file=/x/y,create=on".parse().unwrap();
        assert_eq!(options.size, 0);
        assert_eq!(options.medium, Medium::File { path: "/x/y".into(), create: true, sparse: true });
    }

    #[test]
    fn errors_are_one_line_that_names_the_option() {
        for (text, part) in [
            ("sise=1G", "unknown option `sise`"),
            ("size=1X", "size=1X: wanted bytes"),
            ("size=99999999999999999999", "size="),
            ("size=16777216T", "size="),
            ("lba=513", "lba: wanted 512 or 4096, found 513"),
            ("size=1000", "size: wanted a multiple of the logical block"),
            ("wcache", "wcache=: wanted on or off"),
            ("queues=70000", "queues=70000"),
            ("latency=5", "latency=5: wanted a number with unit ns"),
            ("order=any", "order=any: wanted fetched or random"),
            ("medium=disk", "medium=disk: wanted memory or null"),
            ("no-snoop=off", "no-snoop=off: wanted never or controllable"),
        ] {
            let error = text.parse::<Options>().expect_err(text).to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
