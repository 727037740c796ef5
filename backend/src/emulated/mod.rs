//! An NVMe function that lives in this process, behind a software IOMMU. It speaks the same two traits as a function under
//! VFIO, so driver, engine and session run above it unchanged, without privilege and without hardware.
//!
//! ```text
//! driver --write32--> Bar --> Controller --run_io--> Entry --execute--> Store   (the medium)
//!                                 |                              |
//!                                 +------ every DMA -------> SoftIommu --> Window (guest RAM, driver's buffers)
//!                                 +------ vectors ---------> eventfds
//! ```
//!
//! It is honest: nothing is reached but what was mapped, nothing happens without bus master, and it decodes commands by
//! its own table of offsets. It can be simple because it has one namespace and its commands never wait.

mod admin;
mod config;
mod controller;
mod events;
mod fault;
mod features;
mod function;
mod identify;
mod iommu;
mod logs;
mod medium;
mod nvm;
mod prp;
mod queue;
mod registers;
mod run;
mod sgl;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::addr::{Iova, Span};
use crate::hardware::{AddressSpace, Function};

pub use controller::Traffic;
pub use fault::{Commands, Effect, Fault};
pub use function::EmulatedFunction;
pub use iommu::{Access, DmaFault, SoftIommu};
pub use medium::Medium;
pub use wire::Status;

/// Firmware revision, at most 8 characters.
const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// When commands run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A doorbell write executes what it announces before it returns, on the thread that wrote it.
    Inline,
    /// A thread of the controller's own executes commands some time after the doorbell.
    Threaded,
}

/// What the function is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of the disk, bytes; a multiple of `lba`. Zero takes the size of an existing file.
    pub size: u64,
    /// Size of a logical block, bytes: 512 or 4096.
    pub lba: u32,
    /// Most I/O queue pairs the controller grants.
    pub queues: u16,
    /// Most entries of an I/O queue (CAP.MQES + 1).
    pub queue_entries: u16,
    /// MDTS: largest transfer is `4096 << mdts` bytes; 0 means no limit.
    pub mdts: u8,
    /// True if I/O commands may use Scatter Gather Lists.
    pub sgl: bool,
    /// CAP.DSTRD: doorbells are `4 << doorbell_stride` bytes apart.
    pub doorbell_stride: u8,
    /// Where the blocks live.
    pub medium: Medium,
    /// True if the controller has a volatile write cache (on at first).
    pub volatile_cache: bool,
    /// When commands run.
    pub mode: Mode,
    /// How long each I/O command takes. In inline mode time stands still but for [`Machine::advance`], so with any latency
    /// commands stay in flight until then.
    pub latency: Duration,
    /// False keeps MSI-X vectors silent, for a driver that only polls and wants to measure itself.
    pub interrupts: bool,
    /// Width of the IOMMU's addresses, bits; 57 is what five levels of tables give.
    pub address_width: u8,
    /// Address ranges the platform keeps for itself.
    pub reserved: Vec<Span<Iova>>,
    /// Serial number, at most 20 ASCII characters.
    pub serial: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            size: 1 << 30,
            lba: 512,
            queues: 4,
            queue_entries: 1024,
            mdts: 5,
            sgl: false,
            doorbell_stride: 0,
            medium: Medium::Memory,
            volatile_cache: true,
            mode: Mode::Inline,
            latency: Duration::ZERO,
            interrupts: true,
            address_width: 48,
            // The MSI window of x86 (Intel SDM vol. 3 §11.11.1).
            reserved: Span::new(Iova(0xfee0_0000), 1 << 20).into_iter().collect(),
            serial: "EMULATED-0".to_owned(),
        }
    }
}

/// Why a function could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EmulatedError {
    /// An option has a value that no controller can have.
    #[error("emulated function: {option}: wanted {wanted}, found {found}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What is possible.
        wanted: &'static str,
        /// What was given.
        found: u64,
    },
    /// The file could not be used.
    #[error("emulated function: {what} {}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// The step that failed.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The file has another size than the disk was to have.
    #[error(
        "emulated function: {} has {found} bytes, the disk was to have {wanted}; leave the size out to take the file's",
        path.display()
    )]
    FileSize {
        /// Which file.
        path: PathBuf,
        /// Size asked for, bytes.
        wanted: u64,
        /// Size found, bytes.
        found: u64,
    },
    /// Memory for the disk could not be had.
    #[error("emulated function: allocate {size} bytes for the disk: {source}")]
    Memory {
        /// Size asked for, bytes.
        size: u64,
        /// The errno.
        source: io::Error,
    },
    /// The controller's thread could not be started.
    #[error("emulated function: start its thread: {0}")]
    Thread(io::Error),
}

/// A function and the IOMMU it stands behind.
pub struct Machine {
    function: Arc<EmulatedFunction>,
    iommu: SoftIommu,
}

impl Machine {
    /// Builds the function, powered on: bus master off, controller disabled, nothing mapped.
    ///
    /// # Errors
    /// See [`EmulatedError`]; no file is made or changed when an option is wrong.
    pub fn new(options: Options) -> Result<Self, EmulatedError> {
        options.check()?;
        let iommu = SoftIommu::new(options.address_width, &options.reserved);
        let function = Arc::new(EmulatedFunction::new(options, iommu.clone())?);
        Ok(Self { function, iommu })
    }

    /// The function, for a driver.
    #[must_use]
    pub fn function(&self) -> Arc<dyn Function> {
        Arc::clone(&self.function) as Arc<dyn Function>
    }

    /// The address space, for whoever maps memory.
    #[must_use]
    pub fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(self.iommu.clone())
    }

    /// The IOMMU itself, to ask what is mapped and what has faulted.
    #[must_use]
    pub fn iommu(&self) -> &SoftIommu {
        &self.iommu
    }

    /// What the controller has done since the start, summed over its queues.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.function.traffic()
    }

    /// Breaks something; see [`Fault`].
    pub fn inject(&self, fault: Fault) {
        self.function.inject(fault);
    }

    /// Ends all faults. A removed function is plugged in again, as at power-on; commands lost stay lost.
    pub fn heal(&self) {
        self.function.heal();
    }

    /// Moves the controller's clock ahead: commands in flight by [`Options::latency`] or [`Effect::Delay`] whose time has
    /// come by then are executed, in inline mode before this returns.
    pub fn advance(&self, time: Duration) {
        self.function.advance(time);
    }
}

impl Options {
    fn check(&self) -> Result<(), EmulatedError> {
        let check = |good: bool, option, wanted, found| {
            if good { Ok(()) } else { Err(EmulatedError::Option { option, wanted, found }) }
        };
        let from_file = matches!(self.medium, Medium::File { .. });
        check(matches!(self.lba, 512 | 4096), "lba", "512 or 4096", self.lba.into())?;
        check(self.size != 0 || from_file, "size", "at least one logical block", self.size)?;
        check(self.size.is_multiple_of(self.lba.into()), "size", "a multiple of the logical block", self.size)?;
        check((1..=1023).contains(&self.queues), "queues", "1 to 1023", self.queues.into())?;
        check(self.queue_entries >= 2, "queue entries", "at least 2", self.queue_entries.into())?;
        check(self.mdts <= 15, "mdts", "0 to 15", self.mdts.into())?;
        check(self.doorbell_stride <= 8, "doorbell stride", "0 to 8", self.doorbell_stride.into())?;
        check((16..=57).contains(&self.address_width), "address width", "16 to 57", self.address_width.into())?;
        let serial_fits = self.serial.len() <= 20 && self.serial.is_ascii();
        check(serial_fits, "serial", "at most 20 ASCII characters", self.serial.len() as u64)
    }
}

/// Locks `mutex`. A thread that panicked with it has failed its test already; the others may still look.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
