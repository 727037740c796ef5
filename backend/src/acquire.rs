//! Acquires a PCI function, and gathers the evidence for the coherency verdict while nothing is mapped and bus master is off.
//!
//! ```text
//! /dev/iommu ─ IOAS ─ bind ─ page table ─ attach, bus master off ─ evidence ─ (verdict) ─ address space
//!                             └ the kernel's answer on snooping    └ probe of the No Snoop bit
//! /dev/vfio/vfio ─ group ─ IOMMU type 1 ─ open, bus master off ─ the same
//! ```

pub mod hand_over;

use std::io;
use std::sync::Arc;

use crate::coherency::{CacheOps, Facts, NoSnoop, Personality, Policy, Refusal, Verdict, decide};
use crate::iommu::{HandOverError, Interface, KernelSpace, LiveSpace, PageTable, Snoop, Type1Space};
use crate::sys::{CacheLines, Container, Instruction, Ioas, Iommufd};
use crate::vfio::{
    Attached, Bound, FoundInterface, FunctionName, InterfaceChoice, Opened, PassedIn, PciAddress, VfioError, no_snoop,
};

/// Why iommufd is used.
const PASSED_IN: &str = "through the iommufd that was passed in, or that this process could open";

/// A function that this process owns, attached to an empty address space.
pub struct AcquiredFunction {
    name: FunctionName,
    function: Attached,
    mappings: Mappings,
    evidence: Evidence,
    why: String,
}

/// Where memory is mapped for the function.
enum Mappings {
    PageTable(Arc<PageTable>),
    Container(Container),
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
    #[error("{name}: {step}: {source}")]
    Kernel {
        /// The function.
        name: FunctionName,
        /// The step.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The verdict is a refusal.
    #[error("{0}: {1}")]
    Refused(FunctionName, Refusal),
    /// The description of a function that is handed over does not name one.
    #[error("`{0}` is not the name of a function")]
    NoName(String),
    /// The address space cannot be handed over, or not be accepted.
    #[error("{name}: hand over the address space: {source}")]
    HandOver {
        /// The function.
        name: FunctionName,
        /// Why not.
        source: HandOverError,
    },
    /// The successor of a hand-over would treat the caches in another way.
    #[error(
        "{name}: its DMA was {before} and would now be {now}; give the same --no-snoop, or restart instead of handing over"
    )]
    AnotherVerdict {
        /// The function.
        name: FunctionName,
        /// The predecessor's verdict.
        before: Verdict,
        /// The successor's.
        now: Verdict,
    },
}

impl AcquiredFunction {
    /// Acquires the function at `address` through the interface of `choice`.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn acquire(address: PciAddress, choice: InterfaceChoice) -> Result<Self, AcquireError> {
        let opened = Opened::open(address)?;
        let found = opened.find_interface(choice)?;
        let why = found.to_string();
        let acquired = match found {
            FoundInterface::Iommufd(iommufd) => Self::bind_and_attach(address, opened, iommufd),
            FoundInterface::Type1(container, _) => Self::attach_by_group(address, opened, container),
        };
        acquired.map(|acquired| Self { why, ..acquired })
    }

    /// The same through an open `/dev/iommu` that was passed to this process.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn acquire_by(address: PciAddress, iommufd: Iommufd) -> Result<Self, AcquireError> {
        let acquired = Self::bind_and_attach(address, Opened::open(address)?, iommufd)?;
        Ok(Self { why: PASSED_IN.to_owned(), ..acquired })
    }

    /// Acquires the function whose open character device was passed to this process, through an open `/dev/iommu`.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn acquire_passed_in(device: PassedIn, iommufd: Iommufd) -> Result<Self, AcquireError> {
        let name = device.name();
        let (iommufd, ioas) = Self::new_space(name, iommufd)?;
        let acquired = Self::attach(name, device.bind(&iommufd, &ioas)?, iommufd, ioas)?;
        Ok(Self { why: PASSED_IN.to_owned(), ..acquired })
    }

    fn new_space(name: FunctionName, iommufd: Iommufd) -> Result<(Arc<Iommufd>, Ioas), AcquireError> {
        let iommufd = Arc::new(iommufd);
        let step = "allocate an address space (IOMMU_IOAS_ALLOC)";
        let ioas = iommufd.alloc_ioas().map_err(|source| AcquireError::Kernel { name, step, source })?;
        Ok((iommufd, ioas))
    }

    fn bind_and_attach(address: PciAddress, opened: Opened, iommufd: Iommufd) -> Result<Self, AcquireError> {
        let (iommufd, ioas) = Self::new_space(address.into(), iommufd)?;
        Self::attach(address.into(), opened.bind(&iommufd, &ioas)?, iommufd, ioas)
    }

    /// Reacquires a released function into its former address space: what is mapped there is pinned again.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn reacquire(address: PciAddress, space: &KernelSpace) -> Result<Self, AcquireError> {
        let opened = Opened::open(address)?;
        match space {
            KernelSpace::Iommufd(space) => {
                let (iommufd, ioas) = space.iommufd_and_ioas();
                Self::attach(address.into(), opened.bind(&iommufd, &ioas)?, iommufd, ioas)
            }
            KernelSpace::Type1(_) => {
                let container = opened.open_container()?;
                Self::attach_by_group(address, opened, container)
            }
        }
    }

    fn attach(name: FunctionName, bound: Bound, iommufd: Arc<Iommufd>, ioas: Ioas) -> Result<Self, AcquireError> {
        let error = |step| move |source| AcquireError::Kernel { name, step, source };
        let table = PageTable::new(iommufd, ioas, bound.device_id());
        let table = Arc::new(table.map_err(error("allocate a page table (IOMMU_HWPT_ALLOC)"))?);
        let function = bound.attach(Arc::clone(&table))?;
        let snoop = table.snoop().clone();
        Self::with_evidence(name, function, Mappings::PageTable(table), snoop)
    }

    fn attach_by_group(address: PciAddress, opened: Opened, container: Container) -> Result<Self, AcquireError> {
        let function = opened.attach_by_group(&container)?;
        let snoop = Snoop::of_container(&container, address.iommu_hardware());
        Self::with_evidence(address.into(), function, Mappings::Container(container), snoop)
    }

    fn with_evidence(
        name: FunctionName,
        function: Attached,
        mappings: Mappings,
        snoop: Snoop,
    ) -> Result<Self, AcquireError> {
        let no_snoop = no_snoop::probe(&function, name.is_virtual_function());
        let step = "probe the Enable No Snoop bit";
        let no_snoop = no_snoop.map_err(|source| AcquireError::Kernel { name, step, source })?;
        let evidence = Evidence { snoop, no_snoop, lines: CacheLines::detect() };
        Ok(Self { name, function, mappings, evidence, why: String::new() })
    }

    /// The interface, and why it is used, as text.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Which function it is.
    #[must_use]
    pub fn name(&self) -> FunctionName {
        self.name
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
    pub fn into_address_space(self, facts: &Facts) -> Result<(Attached, KernelSpace), AcquireError> {
        let Self { name, function, mappings, evidence, .. } = self;
        let lines = match (decide(facts), evidence.lines) {
            (Verdict::Coherent(_), _) => None,
            (Verdict::Flush(_), Some(lines)) => Some(lines),
            (Verdict::Flush(_), None) => return Err(AcquireError::Refused(name, Refusal::NoCacheOps)),
            (Verdict::Refuse(refusal), _) => return Err(AcquireError::Refused(name, refusal)),
        };
        let error = |step| move |source| AcquireError::Kernel { name, step, source };
        let space = match (mappings, lines) {
            (Mappings::PageTable(table), None) => {
                KernelSpace::Iommufd(LiveSpace::coherent(&table, function.device_file()))
            }
            (Mappings::PageTable(table), Some(lines)) => {
                let space = LiveSpace::flushing(&table, lines, function.device_file());
                KernelSpace::Iommufd(space.map_err(error("allocate a staging page table"))?)
            }
            (Mappings::Container(container), lines) => {
                let space = Type1Space::new(container, lines);
                KernelSpace::Type1(space.map_err(error("read the allowed IOVA ranges (VFIO_IOMMU_GET_INFO)"))?)
            }
        };
        Ok((function, space))
    }

    /// As [`Self::into_address_space`], with the address space that the function had before. The verdict must be the same.
    ///
    /// # Errors
    /// See [`AcquireError`]; the function is closed.
    pub fn into_former_address_space(self, space: &KernelSpace) -> Result<Attached, AcquireError> {
        let Self { name, function, mappings, .. } = self;
        let (step, joined) = match (mappings, space) {
            (Mappings::PageTable(table), KernelSpace::Iommufd(space)) => {
                ("allocate a staging page table", space.rejoin(&table, function.device_file()))
            }
            (Mappings::Container(container), KernelSpace::Type1(space)) => {
                ("map its former memory", space.rejoin(container))
            }
            _ => ("map its former memory", Err(io::Error::other("acquired through the other interface"))),
        };
        joined.map_err(|source| AcquireError::Kernel { name, step, source })?;
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
        let staging = self.snoop.interface == Interface::Iommufd;
        Facts { snoop_enforced, no_snoop, policy, personality, cache_ops, shim, staging }
    }
}
