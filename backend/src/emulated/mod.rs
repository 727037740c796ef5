//! An emulated NVMe function behind a software IOMMU, inside this process. It implements the same two traits as a function
//! under VFIO, so driver, engine and session run on it unchanged, without privileges and without hardware.
//!
//! ```text
//! driver --write32--> Bar --> Controller --run_io--> Entry --execute--> Store   (the medium)
//!                                 |                              |
//!                                 +------ every DMA -------> SoftIommu --> SharedMemory (guest RAM, driver's buffers)
//!                                 +------ vectors ---------> eventfds
//! ```
//!
//! It is strict. DMA reaches only mapped memory and needs bus master. Commands are decoded with offsets of its own, not with
//! those of the driver. It is simple because its commands never block.

mod admin;
mod admin_state;
mod cache;
mod cdev;
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
mod interrupts;
mod iommu;
mod logs;
mod mapping;
mod medium;
mod namespaces;
mod nvm;
mod options;
mod order;
mod prp;
mod queue;
mod register_file;
mod registers;
mod run;
mod second;
mod sgl;
mod staged_space;
#[cfg(test)]
mod tests;
mod traffic;
mod traits;
mod units;
mod whole;
mod wire;
mod worker;
mod zone_options;
mod zoned;
mod zones;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::coherency::{CacheOps, Facts, Personality, Policy};
use crate::hardware::{AddressSpace, CacheFlush, Function};
use crate::vfio::no_snoop;
use crate::whole_function::WholeFunction;

use cache::Cache;
use staged_space::StagedSpace;

pub use cache::StaleLines;
pub use cdev::EmulatedCdev;
pub use fault::{Commands, Effect, Fault};
pub use function::EmulatedFunction;
pub use iommu::SoftIommu;
pub use mapping::{Access, DmaFault};
pub use medium::Medium;
pub use options::{Mode, Options};
pub use order::Order;
pub use staged_space::{LAST_WRITE, SpaceFaults};
pub use traffic::Traffic;
pub use traits::{AnaState, Support, Traits};
pub use wire::Status;
pub use zone_options::ZoneOptions;

/// Firmware revision; at most 8 characters.
const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// Why a function could not be created.
#[derive(Debug, thiserror::Error)]
pub enum EmulatedError {
    /// An option's value is out of range.
    #[error("emulated function: {option}: wanted {wanted}, found {found}")]
    Option {
        /// Option name.
        option: &'static str,
        /// The valid values.
        wanted: &'static str,
        /// The given value.
        found: u64,
    },
    /// The option does not exist.
    #[error("emulated function: unknown option `{option}`; the options are {known}")]
    Unknown {
        /// The given name.
        option: String,
        /// All option names.
        known: String,
    },
    /// An option's value cannot be parsed.
    #[error("emulated function: {option}={found}: wanted {wanted}")]
    Value {
        /// Option name.
        option: &'static str,
        /// The valid values.
        wanted: &'static str,
        /// The given value.
        found: String,
    },
    /// The fault file is invalid.
    #[error("emulated function: faults={}: {reason}", path.display())]
    Faults {
        /// The fault file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An operation on the disk's file failed.
    #[error("emulated function: {operation} {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operation that failed.
        operation: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The file's size differs from the `size` option.
    #[error(
        "emulated function: {} has {found} bytes, but size={wanted} was given; omit size to use the file's size",
        path.display()
    )]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Requested size in bytes.
        wanted: u64,
        /// Size of the file in bytes.
        found: u64,
    },
    /// Memory for the disk could not be allocated.
    #[error("emulated function: allocate {size} bytes for the disk: {source}")]
    Memory {
        /// Requested size in bytes.
        size: u64,
        /// The errno.
        source: io::Error,
    },
    /// Memory for the cache model could not be allocated.
    #[error("emulated function: allocate memory for the cache model: {0}")]
    Cache(io::Error),
    /// The controller's thread could not be started.
    #[error("emulated function: start the controller thread: {0}")]
    Thread(io::Error),
}

/// An emulated function and its IOMMU.
pub struct Machine {
    function: Arc<EmulatedFunction>,
    iommu: SoftIommu,
    cache: Option<Arc<Cache>>,
    /// Present if snooping is not enforced.
    staged: Option<StagedSpace>,
}

impl Machine {
    /// Creates the function in its power-on state: bus master off, controller disabled, nothing mapped.
    ///
    /// # Errors
    /// See [`EmulatedError`]. No file is created or changed if an option is invalid.
    pub fn new(options: Options) -> Result<Self, EmulatedError> {
        options.check()?;
        let faults = options.faults.clone();
        let cache =
            if options.snoop_enforced { None } else { Some(Arc::new(Cache::new().map_err(EmulatedError::Cache)?)) };
        let iommu = SoftIommu::with_cache(cache.clone(), options.address_width, &options.reserved);
        let function = Arc::new(EmulatedFunction::new(options, iommu.clone())?);
        faults.into_iter().for_each(|fault| function.inject(fault));
        let staged = cache.clone().map(|cache| StagedSpace::new(iommu.clone(), cache));
        Ok(Self { function, iommu, cache, staged })
    }

    /// The function as a driver uses it.
    #[must_use]
    pub fn function(&self) -> Arc<dyn Function> {
        Arc::clone(&self.function) as Arc<dyn Function>
    }

    /// The function as whole-function passthrough uses it.
    #[must_use]
    pub fn whole_function(&self) -> Arc<dyn WholeFunction> {
        Arc::clone(&self.function) as Arc<dyn WholeFunction>
    }

    /// The open file of the medium, for a process that takes the drive over; see [`Options::adopted`]. `None` if there is none.
    #[must_use]
    pub fn medium_file(&self) -> Option<Arc<File>> {
        self.function.medium_file()
    }

    /// True if the medium keeps what is written to it.
    #[must_use]
    pub fn stores_data(&self) -> bool {
        self.function.stores_data()
    }

    /// The function's DMA address space.
    #[must_use]
    pub fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(self.iommu.clone())
    }

    /// Flushes the modelled CPU caches, which No Snoop DMA bypasses; `None` if the IOMMU enforces snooping.
    #[must_use]
    pub fn cache(&self) -> Option<Arc<dyn CacheFlush>> {
        self.cache.clone().map(|cache| cache as Arc<dyn CacheFlush>)
    }

    /// The address space of a function that uses No Snoop: memory is flushed on map and on unmap. The same as
    /// [`Self::space`] if snooping is enforced.
    #[must_use]
    pub fn staged_space(&self) -> Arc<dyn AddressSpace> {
        self.staged.as_ref().map_or_else(|| self.space(), |space| Arc::new(space.clone()))
    }

    /// Faults to inject into [`Self::staged_space`]; `None` if snooping is enforced.
    #[must_use]
    pub fn space_faults(&self) -> Option<&SpaceFaults> {
        self.staged.as_ref().map(StagedSpace::faults)
    }

    /// Cache lines that differed from DRAM when memory was mapped or unpinned. Always 0 with [`Self::staged_space`], unless the
    /// memory is written meanwhile.
    #[must_use]
    pub fn stale_lines(&self) -> StaleLines {
        self.staged.as_ref().map_or_else(StaleLines::default, StagedSpace::stale_lines)
    }

    /// The order in which [`Self::staged_space`] pins, flushes and maps memory, as text.
    #[must_use]
    pub fn order(&self) -> &'static str {
        self.staged.as_ref().map_or("mapped", StagedSpace::order)
    }

    /// The facts for the coherency decision.
    ///
    /// # Errors
    /// As [`no_snoop::probe`]: bus master must be off.
    pub fn facts(&self, policy: Policy) -> io::Result<Facts> {
        Ok(Facts {
            snoop_enforced: self.cache.is_none(),
            no_snoop: no_snoop::probe(&*self.function, Some(false))?,
            policy,
            personality: Personality::Mediated,
            cache_ops: CacheOps::ClflushOpt,
            shim: false,
            staging: true,
        })
    }

    /// The IOMMU, with its mappings and faults.
    #[must_use]
    pub fn iommu(&self) -> &SoftIommu {
        &self.iommu
    }

    /// Requests that the user release the function, as the host does when an administrator unbinds it.
    pub fn request_removal(&self) {
        self.function.request_removal();
    }

    /// Counters of the controller since its creation, summed over all queues.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.function.traffic()
    }

    /// Injects a fault; see [`Fault`].
    pub fn inject(&self, fault: Fault) {
        self.function.inject(fault);
    }

    /// Changes the size of the first namespace in bytes, as an administrator does. A host that has enabled Namespace Attribute
    /// Notices gets an event.
    ///
    /// # Errors
    /// If the size is not a multiple of the block size, or the medium cannot grow: a memory medium keeps its initial size, and so
    /// does one that several namespaces share.
    pub fn resize(&self, bytes: u64) -> io::Result<()> {
        self.resize_namespace(1, bytes)
    }

    /// As [`Self::resize`], of any namespace.
    ///
    /// # Errors
    /// The same, or there is no such namespace.
    pub fn resize_namespace(&self, namespace: u32, bytes: u64) -> io::Result<()> {
        self.function.resize(namespace, bytes)
    }

    /// Changes the state of the path to the namespace; [`Traits::ana`] must have been set.
    pub fn set_ana(&self, state: AnaState) {
        self.function.controller.ana.store(state as u8, SeqCst);
    }

    /// Clears all faults. A removed function returns in its power-on state. Lost commands stay lost.
    pub fn clear_faults(&self) {
        self.function.clear_faults();
    }

    /// Advances the controller's clock. Commands delayed by [`Options::latency`] or [`Effect::Delay`] that become due are
    /// executed; in inline mode before this returns.
    pub fn advance(&self, time: Duration) {
        self.function.advance(time);
    }
}

/// Locks `mutex`, even if it is poisoned: the panic has already failed its test, and other threads may continue.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
