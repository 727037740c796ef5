//! Where the function comes from: VFIO, with memory mapped by iommufd, or an emulation in this process. Both log the facts about
//! the CPU caches and the verdict, and set up the address space accordingly.

use std::fmt::Display;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use vhost_device_vfio::acquire::hand_over::Served;
use vhost_device_vfio::acquire::{AcquireError, AcquiredFunction};
use vhost_device_vfio::coherency::{Facts, Personality, Policy, Verdict, decide};
use vhost_device_vfio::config::DeviceArg;
use vhost_device_vfio::driver::nvme::ReacquireFn;
use vhost_device_vfio::emulated::{Machine, Options};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::iommu::KernelSpace;
use vhost_device_vfio::kvm::SecondFile;
use vhost_device_vfio::passthrough::{self, ReacquireError, Reacquired};
use vhost_device_vfio::vfio::{Attached, FunctionName, InterfaceChoice, PciAddress, VfioError, no_snoop};
use vhost_device_vfio::vhost_user::MovableFunction;
use vhost_device_vfio::whole_function::WholeFunction;

use super::OwnedFunction;
use super::movable::{EmulatedDrive, VfioFunction};
use super::vfio_source::{PassedFiles, VfioSource};

/// A function for a driver in this process.
pub(crate) struct Acquired {
    pub(crate) owned: OwnedFunction<dyn Function>,
    /// Reacquires it after the host has had it back.
    pub(crate) reacquire: Option<ReacquireFn>,
    /// The same function, for a process that takes it over.
    pub(crate) movable: Box<dyn MovableFunction>,
}

/// Why KVM is not told. Whoever has a group's file can open the device with it, and keeps this process's memory pinned after its
/// death (tests/host/type1.sh). A character device that was never bound allows neither.
const NO_FILE_FOR_KVM: &str = "KVM cannot be told of its DMA, also with --kvm-socket: this kernel has no character device for \
                               it, and the file of its group would give QEMU the device";

/// What an operator must do who has passed the device in.
const CANNOT_OPEN_AGAIN: &str = "its file was passed in, so this process cannot open it again; when the device is back, start this \
                                 program again with a new file";

/// `--device`, parsed. Nothing has been opened.
pub(crate) enum DeviceSpec {
    Vfio(PciAddress),
    PassedIn,
    Emulated(Box<Options>),
}

/// Where the function comes from.
pub(crate) enum DeviceSource {
    Vfio(VfioSource),
    Emulated(Box<Machine>),
}

impl DeviceSpec {
    /// # Errors
    /// An invalid option of the emulated function.
    pub(crate) fn new(device: &DeviceArg) -> Result<Self> {
        Ok(match device {
            DeviceArg::Pci(address) => Self::Vfio(*address),
            DeviceArg::PassedIn(_) => Self::PassedIn,
            DeviceArg::Emulated(options) => Self::Emulated(Box::new(options.parse()?)),
        })
    }

    /// How a description of a hand-over names it.
    pub(crate) fn in_description(&self) -> String {
        match self {
            Self::Vfio(address) => FunctionName::from(*address).in_description(),
            Self::PassedIn | Self::Emulated(_) => FunctionName::PassedIn(None).in_description(),
        }
    }

    /// Creates the emulated function. A VFIO function is not opened yet.
    ///
    /// # Errors
    /// Why the emulated function cannot be created.
    pub(crate) fn open(self, choice: InterfaceChoice, files: PassedFiles) -> Result<DeviceSource> {
        Ok(match self {
            Self::Vfio(address) => DeviceSource::Vfio(VfioSource::new(Some(address), files, choice)),
            Self::PassedIn => DeviceSource::Vfio(VfioSource::new(None, files, choice)),
            Self::Emulated(options) => DeviceSource::Emulated(Box::new(Machine::new(*options)?)),
        })
    }
}

impl DeviceSource {
    /// Acquires the function for a driver in this process.
    ///
    /// # Errors
    /// Why it cannot be acquired, or cannot be served coherently.
    pub(crate) fn acquire_for_driver(&self, policy: Policy) -> Result<Acquired> {
        match self {
            Self::Vfio(source) => {
                let acquired = source.acquire()?;
                let (name, file) = (acquired.name(), source.second_file());
                let facts = acquired.evidence().facts(Personality::Mediated, policy, false);
                log::info!("{name}: {}", acquired.why());
                log_verdict(&name, &acquired.evidence().snoop, &facts);
                let (function, space) = acquired.into_address_space(&facts)?;
                if file.is_none() && matches!(decide(&facts), Verdict::Flush(_)) {
                    log::warn!("{name}: {NO_FILE_FOR_KVM}");
                }
                of_attached((name, file), function, space, facts)
            }
            Self::Emulated(machine) => {
                let facts = machine.facts(policy)?;
                let space = emulated_space(machine, &facts)?;
                let function = disable_no_snoop(machine.function(), decide(&facts))?;
                let owned = OwnedFunction { function, space, facts, file: None };
                Ok(Acquired { owned, reacquire: None, movable: Box::new(EmulatedDrive::new(machine)) })
            }
        }
    }

    /// Acquires the function to be passed through whole. `shim`: the virtual machine's process will have one. The second value
    /// acquires it anew after its own file has been handed out.
    ///
    /// # Errors
    /// Why it cannot be acquired, or cannot be served coherently.
    pub(crate) fn acquire_whole(
        &self,
        policy: Policy,
        shim: bool,
    ) -> Result<(OwnedFunction<dyn WholeFunction>, Option<passthrough::ReacquireFn>)> {
        match self {
            Self::Vfio(source) => {
                let acquired = source.acquire()?;
                let (name, file) = (acquired.name(), source.second_file());
                let facts = acquired.evidence().facts(Personality::WholeFunction, policy, shim);
                log::info!("{name}: {}", acquired.why());
                log_verdict(&name, &acquired.evidence().snoop, &facts);
                let (function, space) = acquired.into_address_space(&facts)?;
                let former = space.clone();
                let function: Arc<dyn WholeFunction> = Arc::new(function);
                let reacquire: passthrough::ReacquireFn = Box::new(move || reacquire_whole(name, &former, &facts));
                Ok((OwnedFunction { function, space: space.address_space(), facts, file }, Some(reacquire)))
            }
            Self::Emulated(machine) => {
                // `shim: true`, because KVM need not be told of an emulated function.
                let facts = Facts { personality: Personality::WholeFunction, shim: true, ..machine.facts(policy)? };
                let space = emulated_space(machine, &facts)?;
                Ok((OwnedFunction { function: machine.whole_function(), space, facts, file: None }, None))
            }
        }
    }
}

/// What a driver in this process needs of an attached function.
///
/// # Errors
/// The Enable No Snoop bit cannot be cleared.
pub(crate) fn of_attached(
    (name, file): (FunctionName, Option<SecondFile>),
    function: Attached,
    space: KernelSpace,
    facts: Facts,
) -> Result<Acquired> {
    let attached = Arc::new(function);
    let served = Arc::new(Served::new(name, &attached, &space, &facts));
    let (former, again) = (space.clone(), Arc::clone(&served));
    let function = disable_no_snoop(attached, decide(&facts))?;
    let reacquire: ReacquireFn = Box::new(move || reacquire(name, &former, &facts, &again));
    let owned = OwnedFunction { function, space: space.address_space(), facts, file };
    Ok(Acquired { owned, reacquire: Some(reacquire), movable: Box::new(VfioFunction::new(served)) })
}

/// The address at which a function can be opened again.
fn path_of(name: FunctionName) -> Result<PciAddress> {
    match name {
        FunctionName::Address(address) => Ok(address),
        FunctionName::PassedIn(_) => bail!("{name}: {CANNOT_OPEN_AGAIN}"),
    }
}

/// Reacquires a function that the host has had back. The verdict must be the same as before.
fn reacquire(name: FunctionName, space: &KernelSpace, before: &Facts, served: &Served) -> Result<Arc<dyn Function>> {
    let address = path_of(name)?;
    let acquired = AcquiredFunction::reacquire(address, space)?;
    let facts = acquired.evidence().facts(before.personality, before.policy, before.shim);
    let (was, verdict) = (decide(before), decide(&facts));
    if verdict != was {
        bail!("{address}: its DMA was {was} and would now be {verdict}; restart this program to serve it");
    }
    let attached = Arc::new(acquired.into_former_address_space(space)?);
    served.replace(&attached);
    let function: Arc<dyn Function> = attached;
    disable_no_snoop(Arc::clone(&function), verdict).inspect_err(|_| space.address_space().release())
}

/// Acquires a whole function anew, after its own file has been handed out.
fn reacquire_whole(name: FunctionName, space: &KernelSpace, before: &Facts) -> Result<Reacquired, ReacquireError> {
    let address = path_of(name).map_err(ReacquireError::Failed)?;
    let acquired = AcquiredFunction::reacquire(address, space).map_err(explain)?;
    let facts = acquired.evidence().facts(before.personality, before.policy, before.shim);
    let function = acquired.into_former_address_space(space).map_err(explain)?;
    Ok(Reacquired { function: Arc::new(function), facts })
}

fn explain(error: AcquireError) -> ReacquireError {
    match &error {
        AcquireError::Vfio(VfioError::InUse { .. }) => ReacquireError::Held(error.into()),
        AcquireError::Vfio(VfioError::NoSuchFunction(_) | VfioError::NotBound { .. }) => {
            ReacquireError::Taken(error.into())
        }
        _ => ReacquireError::Failed(error.into()),
    }
}

/// The address space that the verdict requires.
fn emulated_space(machine: &Machine, facts: &Facts) -> Result<Arc<dyn AddressSpace>> {
    log_verdict(&"emulated", &"software IOMMU", facts);
    match decide(facts) {
        Verdict::Coherent(_) => Ok(machine.space()),
        Verdict::Flush(_) => Ok(machine.staged_space()),
        Verdict::Refuse(refusal) => bail!("emulated: {refusal}"),
    }
}

/// Disables No Snoop if the verdict requires it.
fn disable_no_snoop(function: Arc<dyn Function>, verdict: Verdict) -> Result<Arc<dyn Function>> {
    let name = function.name().to_owned();
    no_snoop::apply(function, verdict).with_context(|| format!("{name}: clear the Enable No Snoop bit"))
}

/// Logs the facts and the verdict.
fn log_verdict(name: &dyn Display, snoop: &dyn Display, facts: &Facts) {
    log::info!("{name}: {snoop}; {}", facts.no_snoop);
    log::info!("{name}: DMA is {}", decide(facts));
    if !facts.snoop_enforced {
        log::warn!(
            "{name}: this IOMMU does not enforce snooping; a device that uses PCI No Snoop can bypass the CPU caches"
        );
    }
}
