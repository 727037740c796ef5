//! Acquires a PCI function, and gathers the evidence for the coherency verdict while nothing is mapped and bus master is off.
//!
//! ```text
//! /dev/iommu ─ IOAS ─ bind ─ page table ─ attach, bus master off ─ evidence ─ (verdict) ─ address space
//!                             └ the kernel's answer on snooping    └ probe of the No Snoop bit
//! ```

pub mod hand_over;

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::coherency::{CacheOps, Facts, NoSnoop, Personality, Policy, Refusal, Verdict, decide};
use crate::iommu::{HandOverError, LiveSpace, PageTable, Snoop};
use crate::sys::{CacheLines, Instruction, Ioas, Iommufd};
use crate::vfio::{Attached, NotAnAddress, Opened, PciAddress, VfioError, no_snoop, open_iommufd};

/// A function that this process owns, attached to an empty address space.
pub struct AcquiredFunction {
    address: PciAddress,
    function: Attached,
    table: Arc<PageTable>,
    evidence: Evidence,
}

/// The facts about the caches that hardware and kernel report.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// Of the IOMMU.
    pub snoop: Snoop,
    /// Of the device.
    pub no_snoop: NoSnoop,
    /// Of this CPU; `None` if it has no instruction to flush with.
    pub lines: Option<CacheLines>,
}

/// Why a function cannot be acquired, or has no address space.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// Of the function or `/dev/iommu`.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A step that failed in the kernel.
    #[error("{address}: {step}: {source}")]
    Kernel {
        /// The function.
        address: PciAddress,
        /// The step.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The verdict is a refusal.
    #[error("{0}: {1}")]
    Refused(PciAddress, Refusal),
    /// The description of a function that is handed over does not name one.
    #[error(transparent)]
    Address(NotAnAddress),
    /// The address space cannot be handed over, or not be accepted.
    #[error("{address}: hand over the address space: {source}")]
    HandOver {
        /// The function.
        address: PciAddress,
        /// Why not.
        source: HandOverError,
    },
    /// The successor of a hand-over would treat the caches in another way.
    #[error(
        "{address}: its DMA was {before} and would now be {now}; give the same --no-snoop, or restart instead of handing over"
    )]
    AnotherVerdict {
        /// The function.
        address: PciAddress,
        /// The predecessor's verdict.
        before: Verdict,
        /// The successor's.
        now: Verdict,
    },
}

impl AcquiredFunction {
    /// Acquires the function at `address`.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn acquire(address: PciAddress) -> Result<Self, AcquireError> {
        let opened = Opened::open(address)?;
        let iommufd = Arc::new(open_iommufd(Path::new("/dev/iommu"))?);
        let ioas = iommufd.alloc_ioas();
        let step = "allocate an address space (IOMMU_IOAS_ALLOC)";
        let ioas = ioas.map_err(|source| AcquireError::Kernel { address, step, source })?;
        Self::attach(address, opened, iommufd, ioas)
    }

    /// Reacquires a released function into its former address space: what is mapped there is pinned again.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn reacquire(address: PciAddress, space: &LiveSpace) -> Result<Self, AcquireError> {
        let (iommufd, ioas) = space.iommufd_and_ioas();
        Self::attach(address, Opened::open(address)?, iommufd, ioas)
    }

    fn attach(address: PciAddress, opened: Opened, iommufd: Arc<Iommufd>, ioas: Ioas) -> Result<Self, AcquireError> {
        let error = |step| move |source| AcquireError::Kernel { address, step, source };
        let bound = opened.bind(&iommufd, &ioas)?;
        let table = PageTable::new(iommufd, ioas, bound.device_id());
        let table = Arc::new(table.map_err(error("allocate a page table (IOMMU_HWPT_ALLOC)"))?);
        let function = bound.attach(Arc::clone(&table))?;
        let no_snoop = no_snoop::probe(&function, address.is_virtual_function());
        let no_snoop = no_snoop.map_err(error("probe the Enable No Snoop bit"))?;
        let evidence = Evidence { snoop: table.snoop().clone(), no_snoop, lines: CacheLines::detect() };
        Ok(Self { address, function, table, evidence })
    }

    /// See [`Evidence`].
    #[must_use]
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    /// Creates the address space that the verdict on `facts` requires. If the verdict requires No Snoop to be disabled,
    /// [`no_snoop::apply`] does that.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn into_address_space(self, facts: &Facts) -> Result<(Attached, LiveSpace), AcquireError> {
        let Self { address, function, table, evidence } = self;
        let error = |step| move |source| AcquireError::Kernel { address, step, source };
        let space = match (decide(facts), evidence.lines) {
            (Verdict::Coherent(_), _) => LiveSpace::coherent(&table),
            (Verdict::Flush(_), Some(lines)) => {
                let space = LiveSpace::flushing(&table, lines, function.device_file());
                space.map_err(error("allocate a staging page table"))?
            }
            (Verdict::Flush(_), None) => return Err(AcquireError::Refused(address, Refusal::NoCacheOps)),
            (Verdict::Refuse(refusal), _) => return Err(AcquireError::Refused(address, refusal)),
        };
        Ok((function, space))
    }

    /// As [`Self::into_address_space`], with the address space that the function had before. The verdict must be the same.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn into_former_address_space(self, space: &LiveSpace) -> Result<Attached, AcquireError> {
        let Self { address, function, table, .. } = self;
        let step = "allocate a staging page table";
        space.rejoin(&table, function.device_file()).map_err(|source| AcquireError::Kernel {
            address,
            step,
            source,
        })?;
        Ok(function)
    }
}

impl Evidence {
    /// The facts: this evidence, and the choices of the operator.
    #[must_use]
    pub fn facts(&self, personality: Personality, policy: Policy, shim: bool) -> Facts {
        let cache_ops = self.lines.map_or(CacheOps::None, |lines| match lines.instruction() {
            Instruction::ClflushOpt => CacheOps::ClflushOpt,
            Instruction::Clflush => CacheOps::Clflush,
            Instruction::DcCivac => CacheOps::DcCivac,
        });
        let (snoop_enforced, no_snoop) = (self.snoop.enforced, self.no_snoop);
        Facts { snoop_enforced, no_snoop, policy, personality, cache_ops, shim }
    }
}
