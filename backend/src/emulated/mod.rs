//! An NVMe function that lives in this process, behind a software IOMMU. It speaks the same two traits as a function under
//! VFIO, so driver, engine and session run above it unchanged, without privilege and without hardware.
//!
//! ```text
//! driver --write32--> Bar --> Controller --run_io--> Entry --execute--> Store   (the medium)
//!                                 |                              |
//!                                 +------ every DMA -------> SoftIommu --> SharedMemory (guest RAM, driver's buffers)
//!                                 +------ vectors ---------> eventfds
//! ```
//!
//! It is honest: nothing is reached but what was mapped, nothing happens without bus master, and it decodes commands by
//! its own table of offsets. It can be simple because it has one namespace and its commands never wait.

mod admin;
mod admin_state;
mod cache;
mod config;
mod controller;
mod dma;
mod event_state;
mod events;
mod fault;
mod fault_file;
mod features;
mod function;
mod identify;
mod iommu;
mod logs;
mod mapping;
mod medium;
mod nvm;
mod options;
mod prp;
mod queue;
mod register_file;
mod registers;
mod run;
mod sgl;
mod staged_space;
#[cfg(test)]
mod tests;
mod traffic;
mod units;
mod whole;
mod wire;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::coherency::{CacheOps, Facts, Personality, Policy};
use crate::hardware::{AddressSpace, CacheFlush, Function};
use crate::vfio::no_snoop;
use crate::whole_function::WholeFunction;

use cache::Cache;
use staged_space::StagedSpace;

pub use cache::StaleLines;
pub use fault::{Commands, Effect, Fault};
pub use function::EmulatedFunction;
pub use iommu::SoftIommu;
pub use mapping::{Access, DmaFault};
pub use medium::Medium;
pub use options::{Mode, Options};
pub use staged_space::{LAST_WRITE, SpaceFaults};
pub use traffic::Traffic;
pub use wire::Status;

/// Firmware revision, at most 8 characters.
const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

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
    /// There is no such option.
    #[error("emulated function: no option `{option}`; there are {known}")]
    Unknown {
        /// What was given.
        option: String,
        /// All names.
        known: &'static str,
    },
    /// An option's value cannot be understood.
    #[error("emulated function: {option}={found}: wanted {wanted}")]
    Value {
        /// Its name.
        option: &'static str,
        /// What is possible.
        wanted: &'static str,
        /// What was given.
        found: String,
    },
    /// The list of faults is not one.
    #[error("emulated function: faults={}: {what}", path.display())]
    Faults {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
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
    /// Memory for the model of the caches could not be had.
    #[error("emulated function: allocate memory for a model of the caches: {0}")]
    Cache(io::Error),
    /// The controller's thread could not be started.
    #[error("emulated function: start its thread: {0}")]
    Thread(io::Error),
}

/// A function and the IOMMU it stands behind.
pub struct Machine {
    function: Arc<EmulatedFunction>,
    iommu: SoftIommu,
    cache: Option<Arc<Cache>>,
    /// There if snooping is not enforced.
    flushed: Option<StagedSpace>,
}

impl Machine {
    /// Builds the function, powered on: bus master off, controller disabled, nothing mapped.
    ///
    /// # Errors
    /// See [`EmulatedError`]; no file is made or changed when an option is wrong.
    pub fn new(options: Options) -> Result<Self, EmulatedError> {
        options.check()?;
        let faults = options.faults.clone();
        let cache =
            if options.snoop_enforced { None } else { Some(Arc::new(Cache::new().map_err(EmulatedError::Cache)?)) };
        let iommu = SoftIommu::with_cache(cache.clone(), options.address_width, &options.reserved);
        let function = Arc::new(EmulatedFunction::new(options, iommu.clone())?);
        faults.into_iter().for_each(|fault| function.inject(fault));
        let flushed = cache.clone().map(|cache| StagedSpace::new(iommu.clone(), cache));
        Ok(Self { function, iommu, cache, flushed })
    }

    /// The function, for a driver.
    #[must_use]
    pub fn function(&self) -> Arc<dyn Function> {
        Arc::clone(&self.function) as Arc<dyn Function>
    }

    /// The function, to be passed through.
    #[must_use]
    pub fn whole_function(&self) -> Arc<dyn WholeFunction> {
        Arc::clone(&self.function) as Arc<dyn WholeFunction>
    }

    /// The address space, for whoever maps memory.
    #[must_use]
    pub fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(self.iommu.clone())
    }

    /// How to flush the caches that the function may go behind; none if the IOMMU enforces snooping.
    #[must_use]
    pub fn cache(&self) -> Option<Arc<dyn CacheFlush>> {
        self.cache.clone().map(|cache| cache as Arc<dyn CacheFlush>)
    }

    /// The address space for a function that goes behind the caches: memory is flushed as it becomes reachable and when it
    /// no longer is. As [`Self::space`] if snooping is enforced.
    #[must_use]
    pub fn staged_space(&self) -> Arc<dyn AddressSpace> {
        self.flushed.as_ref().map_or_else(|| self.space(), |space| Arc::new(space.clone()))
    }

    /// What to refuse in [`Self::staged_space`]; none if snooping is enforced.
    #[must_use]
    pub fn space_faults(&self) -> Option<&SpaceFaults> {
        self.flushed.as_ref().map(StagedSpace::faults)
    }

    /// Where memory was exposed or unpinned and caches and DRAM did not agree; always 0 with [`Self::staged_space`] if
    /// nobody writes to memory meanwhile.
    #[must_use]
    pub fn stale_lines(&self) -> StaleLines {
        self.flushed.as_ref().map_or_else(StaleLines::default, StagedSpace::stale_lines)
    }

    /// In which order [`Self::staged_space`] exposes memory, in words.
    #[must_use]
    pub fn order(&self) -> &'static str {
        self.flushed.as_ref().map_or("mapped", StagedSpace::order)
    }

    /// What a decision about the CPU caches rests on.
    ///
    /// # Errors
    /// As [`no_snoop::probe`]: bus master must be off.
    pub fn facts(&self, policy: Policy) -> io::Result<Facts> {
        Ok(Facts {
            snoop_enforced: self.cache.is_none(),
            no_snoop: no_snoop::probe(&*self.function, false)?,
            policy,
            personality: Personality::Mediated,
            cache_ops: CacheOps::ClflushOpt,
            shim: false,
        })
    }

    /// The IOMMU itself, to ask what is mapped and what has faulted.
    #[must_use]
    pub fn iommu(&self) -> &SoftIommu {
        &self.iommu
    }

    /// Asks the owner to give the function back, as the host does when an administrator unbinds it.
    pub fn request_removal(&self) {
        self.function.request_removal();
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

    /// Changes the size of the disk, bytes, as an administrator does to a namespace; whoever has asked for notices is told.
    ///
    /// # Errors
    /// Not whole blocks, or the medium cannot grow: memory has at most the size it was made with.
    pub fn resize(&self, bytes: u64) -> io::Result<()> {
        self.function.resize(bytes)
    }

    /// Ends all faults. A removed function is plugged in again, as at power-on; commands lost stay lost.
    pub fn clear_faults(&self) {
        self.function.clear_faults();
    }

    /// Moves the controller's clock ahead: commands in flight by [`Options::latency`] or [`Effect::Delay`] whose time has
    /// come by then are executed, in inline mode before this returns.
    pub fn advance(&self, time: Duration) {
        self.function.advance(time);
    }
}

/// Locks `mutex`. A thread that panicked with it has failed its test already; the others may still look.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
