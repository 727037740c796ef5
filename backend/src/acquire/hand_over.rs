//! Hands a function and its address space over to another process of this program, its successor. Guest memory stays pinned and
//! mapped throughout: both processes hold the device's file and the iommufd, and the kernel gives neither up before the last one
//! closes it.
//!
//! ```text
//! predecessor                                    successor
//! Driver::quiesce
//! Served::export ── description, descriptors ──► accept: checks, evidence, verdict ─► the function, its space, a TakeOver
//!                                                add the guest's regions, bring the driver up
//!                ◄── up ─────────────────────────
//! Exported::leave, Driver::leave
//!                ── yours ─────────────────────► TakeOver::complete
//!
//! If the successor has ended before it was told that all is its own:
//! Driver::resume, Exported::take_back, Driver::recover
//! ```
//!
//! A successor that fails before [`TakeOver::complete`] drops what it has. That stops the device and unmaps the successor's own
//! memory, and changes nothing else. One that is killed leaves both to the predecessor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use super::{AcquireError, Evidence};
use crate::coherency::{Facts, Personality, Policy, Refusal, Verdict, decide};
use crate::hardware::LeftToSuccessor;
use crate::iommu::{HandOverError, KernelSpace, LiveSpace, PageTable, SpaceDescription};
use crate::sys::{CacheLines, Iommufd, Owner, Ownership};
use crate::vfio::{Attached, FunctionName, no_snoop};

/// A function that is served, as far as a hand-over needs it. It does not keep the function open.
pub struct Served {
    name: FunctionName,
    function: Mutex<Weak<Attached>>,
    space: KernelSpace,
    facts: Facts,
}

/// What the successor must know. It goes with the descriptors of [`Exported::descriptors`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionDescription {
    /// The function, such as `0000:00:04.0`; see [`FunctionName::in_description`].
    pub address: String,
    /// Its address space.
    pub space: SpaceDescription,
    /// The facts of the predecessor's verdict.
    pub facts: Facts,
}

/// A function that is being handed over. Dropping it is [`Self::take_back`].
pub struct Exported {
    description: FunctionDescription,
    descriptors: [OwnedFd; 2],
    space: LiveSpace,
    ownership: Ownership,
}

/// A function and its address space as the successor has them, with what remains to be done.
pub struct Accepted {
    /// Which function it is.
    pub name: FunctionName,
    /// The function, with bus master off.
    pub function: Attached,
    /// Its address space. A region that the predecessor had mapped is added without a call to the kernel; no other region can be
    /// added before [`TakeOver::complete`].
    pub space: LiveSpace,
    /// The facts, gathered anew. The verdict is the predecessor's.
    pub facts: Facts,
    /// See [`TakeOver`].
    pub take_over: TakeOver,
}

/// Owed by a successor: what it has belongs to the predecessor until [`Self::complete`].
#[must_use = "until it is complete, everything belongs to the predecessor"]
pub struct TakeOver(LiveSpace);

impl Served {
    /// `function` is attached to the page table or container of `space`; `facts` are those of its verdict.
    #[must_use]
    pub fn new(name: FunctionName, function: &Arc<Attached>, space: &KernelSpace, facts: &Facts) -> Self {
        let function = Mutex::new(Arc::downgrade(function));
        Self { name, function, space: space.clone(), facts: *facts }
    }

    /// The function has been reacquired: it is `function` now.
    pub fn replace(&self, function: &Arc<Attached>) {
        *self.function.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(function);
    }

    /// Whether the interface through which it is served allows a hand-over.
    ///
    /// # Errors
    /// [`AcquireError::HandOver`].
    pub fn may_move(&self) -> Result<(), AcquireError> {
        self.iommufd().map(|_| ())
    }

    fn iommufd(&self) -> Result<&LiveSpace, AcquireError> {
        match &self.space {
            KernelSpace::Iommufd(live) => Ok(live),
            KernelSpace::Type1(_) => Err(AcquireError::HandOver { name: self.name, source: HandOverError::Type1 }),
        }
    }

    /// Describes the function and duplicates its descriptors for a successor. The device must have stopped; from now on nothing
    /// can be mapped. `flushed`: no command was in flight when the device stopped, so that the caches hold nothing that it has
    /// written since. Else a successor whose verdict is to flush flushes all guest memory.
    ///
    /// # Errors
    /// [`AcquireError::HandOver`]; nothing has changed.
    pub fn export(&self, flushed: bool) -> Result<Exported, AcquireError> {
        let name = self.name;
        let failed = |source| AcquireError::HandOver { name, source };
        let kernel = |what| move |source| failed(HandOverError::Kernel { what, source });
        let live = self.iommufd()?;
        let function = self.function.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let function = function.ok_or_else(|| failed(HandOverError::Released))?;
        let (iommufd, _) = live.iommufd_and_ioas();
        let device = function.duplicate_file().map_err(kernel("duplicate the device's file"))?;
        let descriptors = [device, iommufd.duplicate().map_err(kernel("duplicate the iommufd"))?];
        let space = live.describe(flushed).map_err(failed)?;
        let description = FunctionDescription { address: name.in_description(), space, facts: self.facts };
        Ok(Exported { description, descriptors, space: live.clone(), ownership: iommufd.ownership().clone() })
    }
}

impl Exported {
    /// See [`FunctionDescription`].
    #[must_use]
    pub fn description(&self) -> &FunctionDescription {
        &self.description
    }

    /// The device's file and the iommufd, in this order.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        self.descriptors.each_ref().map(AsFd::as_fd)
    }

    /// Leaves everything to the successor, which is up. From here on, dropping the function, the address space or a buffer
    /// changes nothing in the kernel; [`Driver::leave`](crate::driver::Driver::leave) ends the driver. Tell the successor
    /// afterwards.
    #[must_use]
    pub fn leave(self) -> LeftToSuccessor {
        self.ownership.pass_to(Owner::Successor);
        LeftToSuccessor::new()
    }

    /// Takes everything back from a successor that has failed: unmaps what it had mapped. It must have ended, and the device must
    /// do no DMA ([`Driver::resume`](crate::driver::Driver::resume)). Then
    /// [`Driver::recover`](crate::driver::Driver::recover) brings the device up again.
    ///
    /// # Errors
    /// See [`HandOverError`]. The device can be brought up nevertheless.
    pub fn take_back(self) -> Result<(), HandOverError> {
        self.space.take_back()
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        if self.ownership.is_ours()
            && let Err(error) = self.space.take_back()
        {
            log::error!("{}: {error}", self.description.address);
        }
    }
}

impl TakeOver {
    /// Completes the take-over, once the predecessor has left everything or has ended: unmaps the predecessor's own buffers, and
    /// moves the account of pinned memory to this process.
    ///
    /// # Errors
    /// [`HandOverError::NotAdopted`] if guest memory has not been added to the space. Everything still belongs to the
    /// predecessor then, so see [`Self::ready`].
    pub fn complete(self) -> Result<(), HandOverError> {
        self.0.take_over()
    }

    /// Fails as [`Self::complete`] would. To be called before the predecessor is told to leave.
    ///
    /// # Errors
    /// [`HandOverError::NotAdopted`].
    pub fn ready(&self) -> Result<(), HandOverError> {
        self.0.not_adopted().first().map_or(Ok(()), |span| Err(HandOverError::NotAdopted(*span)))
    }
}

/// Accepts a function from a predecessor: checks each number and each range of `description` against the kernel, gathers the
/// evidence again, and compares the verdict. `descriptors` are the device's file and the iommufd.
///
/// # Errors
/// See [`AcquireError`]. The predecessor can go on: nothing that it owns has changed.
pub fn accept(
    description: &FunctionDescription,
    descriptors: [OwnedFd; 2],
    (personality, policy, shim): (Personality, Policy, bool),
) -> Result<Accepted, AcquireError> {
    let [device, iommufd] = descriptors;
    let name = FunctionName::of_description(&description.address, &device);
    let name = name.ok_or_else(|| AcquireError::NoName(description.address.clone()))?;
    let failed = |source| AcquireError::HandOver { name, source };
    let kernel = |what| move |source| failed(HandOverError::Kernel { what, source });
    let iommufd = Arc::new(Iommufd::handed_over(iommufd).map_err(kernel("check the iommufd that was handed over"))?);
    let table = Arc::new(PageTable::handed_over(&iommufd, &description.space).map_err(failed)?);
    let function = Attached::handed_over(name, device, Arc::clone(&table))?;
    let no_snoop = no_snoop::probe(&function, name.is_virtual_function());
    let no_snoop = no_snoop.map_err(kernel("probe the Enable No Snoop bit"))?;
    let evidence = Evidence { snoop: table.snoop().clone(), no_snoop, lines: CacheLines::detect() };
    let facts = evidence.facts(personality, policy, shim);
    let (before, now) = (decide(&description.facts), decide(&facts));
    match now {
        Verdict::Refuse(refusal) => return Err(AcquireError::Refused(name, refusal)),
        Verdict::Flush(_) if evidence.lines.is_none() => {
            return Err(AcquireError::Refused(name, Refusal::NoCacheOps));
        }
        _ if now != before => return Err(AcquireError::AnotherVerdict { name, before, now }),
        Verdict::Flush(_) if description.space.staging.is_none() => {
            let why = "the verdict is to flush, and it has no staging space".to_owned();
            return Err(failed(HandOverError::Description(why)));
        }
        Verdict::Flush(_) | Verdict::Coherent(_) => {}
    }
    let space = LiveSpace::handed_over(&description.space, &table, function.device_file(), evidence.lines);
    let space = space.map_err(failed)?;
    Ok(Accepted { name, function, take_over: TakeOver(space.clone()), space, facts })
}
