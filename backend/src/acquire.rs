//! Takes a PCI function, in the one order that is right, and gathers what the coherency decision rests on while nothing is
//! mapped and the function can start no DMA.
//!
//! ```text
//! /dev/iommu ─ IOAS ─ bind ─ page table ─ attach, bus master off ─ evidence ─ (verdict) ─ address space
//!                             └ the kernel's answer on snooping    └ the No Snoop bit, tried
//! ```

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::coherency::{CacheOps, Facts, NoSnoop, Personality, Policy, Refusal, Verdict, decide};
use crate::iommu::{LiveSpace, PageTable, Snoop};
use crate::sys::{CacheLines, Instruction, Ioas, Iommufd};
use crate::vfio::{Attached, Opened, PciAddress, VfioError, no_snoop, open_iommufd};

/// A function that is ours, attached to an address space that is still empty.
pub struct AcquiredFunction {
    address: PciAddress,
    function: Attached,
    table: Arc<PageTable>,
    evidence: Evidence,
}

/// What is known about the caches before anything is decided.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// The IOMMU's side.
    pub snoop: Snoop,
    /// The device's side.
    pub no_snoop: NoSnoop,
    /// This CPU's side.
    pub lines: Option<CacheLines>,
}

/// Why a function could not be taken, or not be given an address space.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// The function or `/dev/iommu`.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A step that the kernel refused.
    #[error("{address}: {what}: {source}")]
    Kernel {
        /// The function.
        address: PciAddress,
        /// The step.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The verdict.
    #[error("{0}: {1}")]
    Refused(PciAddress, Refusal),
}

impl AcquiredFunction {
    /// Takes the function at `address`.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is released.
    pub fn acquire(address: PciAddress) -> Result<Self, AcquireError> {
        let opened = Opened::open(address)?;
        let iommufd = Arc::new(open_iommufd(Path::new("/dev/iommu"))?);
        let ioas = iommufd.ioas();
        let what = "allocate an address space (IOMMU_IOAS_ALLOC)";
        let ioas = ioas.map_err(|source| AcquireError::Kernel { address, what, source })?;
        Self::attach(address, opened, iommufd, ioas)
    }

    /// Takes a function that has been away, for the address space it had: what is mapped there is pinned again.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is released.
    pub fn reacquire(address: PciAddress, space: &LiveSpace) -> Result<Self, AcquireError> {
        let (iommufd, ioas) = space.iommufd_and_ioas();
        Self::attach(address, Opened::open(address)?, iommufd, ioas)
    }

    fn attach(address: PciAddress, opened: Opened, iommufd: Arc<Iommufd>, ioas: Ioas) -> Result<Self, AcquireError> {
        let step = |what| move |source| AcquireError::Kernel { address, what, source };
        let bound = opened.bind(&iommufd, &ioas)?;
        let table = PageTable::new(iommufd, ioas, bound.device_id());
        let table = Arc::new(table.map_err(step("make a page table (IOMMU_HWPT_ALLOC)"))?);
        let function = bound.attach(Arc::clone(&table))?;
        let no_snoop = no_snoop::probe(&function, address.is_virtual_function());
        let no_snoop = no_snoop.map_err(step("try the Enable No Snoop bit"))?;
        let evidence = Evidence { snoop: table.snoop().clone(), no_snoop, lines: CacheLines::detect() };
        Ok(Self { address, function, table, evidence })
    }

    /// What is known about the caches.
    #[must_use]
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    /// Obeys the verdict on `facts` in how memory is mapped. That a bit is to be held off is left to
    /// [`no_snoop::apply`].
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is released.
    pub fn into_address_space(self, facts: &Facts) -> Result<(Attached, LiveSpace), AcquireError> {
        let Self { address, function, table, evidence } = self;
        let step = |what| move |source| AcquireError::Kernel { address, what, source };
        let space = match (decide(facts), evidence.lines) {
            (Verdict::Coherent(_), _) => LiveSpace::coherent(&table),
            (Verdict::Flush(_), Some(lines)) => {
                let space = LiveSpace::flushing(&table, lines, function.device_file());
                space.map_err(step("make a staging page table"))?
            }
            (Verdict::Flush(_), None) => return Err(AcquireError::Refused(address, Refusal::NoCacheOps)),
            (Verdict::Refuse(refusal), _) => return Err(AcquireError::Refused(address, refusal)),
        };
        Ok((function, space))
    }

    /// As [`Self::into_address_space`], into the address space that the function had before. The verdict must be the one it had then.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is released.
    pub fn into_former_address_space(self, space: &LiveSpace) -> Result<Attached, AcquireError> {
        let Self { address, function, table, .. } = self;
        let what = "make a staging page table";
        space.rejoin(&table, function.device_file()).map_err(|source| AcquireError::Kernel { address, what, source })?;
        Ok(function)
    }
}

impl Evidence {
    /// Completes the facts with what is not evidence but choice.
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
