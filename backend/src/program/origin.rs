//! How the function is obtained: from VFIO, with its memory mapped by iommufd, or made in this process. Either says what is
//! known about the CPU caches and what follows, and obeys.

use std::fmt::Display;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use vhost_device_vfio::acquire::AcquiredFunction;
use vhost_device_vfio::coherency::{Facts, Personality, Policy, Verdict, decide};
use vhost_device_vfio::config::DeviceArg;
use vhost_device_vfio::driver::nvme::ReacquireFn;
use vhost_device_vfio::emulated::{Machine, Options};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::iommu::LiveSpace;
use vhost_device_vfio::vfio::{PciAddress, no_snoop};
use vhost_device_vfio::whole_function::WholeFunction;

use super::Obtained;

/// What `--device` names, understood but not touched.
pub(crate) enum Plan {
    Vfio(PciAddress),
    Emulated(Box<Options>),
}

/// Where the function comes from.
pub(crate) enum Origin {
    Vfio(PciAddress),
    Emulated(Box<Machine>),
}

impl Plan {
    /// # Errors
    /// An option that no emulated function has.
    pub(crate) fn new(device: &DeviceArg) -> Result<Self> {
        Ok(match device {
            DeviceArg::Pci(address) => Self::Vfio(*address),
            DeviceArg::Emulated(options) => Self::Emulated(Box::new(options.parse()?)),
        })
    }

    /// Makes the function that is to be emulated.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub(crate) fn open(self) -> Result<Origin> {
        Ok(match self {
            Self::Vfio(address) => Origin::Vfio(address),
            Self::Emulated(options) => Origin::Emulated(Box::new(Machine::new(*options)?)),
        })
    }
}

impl Origin {
    /// The function for a driver in this process, and how to get it again after the host has taken it back.
    ///
    /// # Errors
    /// What is in the way, or that it cannot be served coherently.
    pub(crate) fn for_driver(&self, policy: Policy) -> Result<(Obtained<dyn Function>, Option<ReacquireFn>)> {
        match self {
            Self::Vfio(address) => {
                let acquired = AcquiredFunction::acquire(*address)?;
                let facts = acquired.evidence().facts(Personality::Mediated, policy, false);
                announce(address, &acquired.evidence().snoop, &facts);
                let (function, space) = acquired.into_address_space(&facts)?;
                let (address, former) = (*address, space.clone());
                let function = hold_off(Arc::new(function), decide(&facts))?;
                let reacquire: ReacquireFn = Box::new(move || reacquire(address, &former, &facts));
                Ok((Obtained { function, space: Arc::new(space), facts, file: address.cdev() }, Some(reacquire)))
            }
            Self::Emulated(machine) => {
                let facts = machine.facts(policy)?;
                let space = emulated_space(machine, &facts)?;
                let function = hold_off(machine.function(), decide(&facts))?;
                Ok((Obtained { function, space, facts, file: None }, None))
            }
        }
    }

    /// The function to be passed through whole; `shim` if there will be one in the virtual machine's process.
    ///
    /// # Errors
    /// What is in the way, or that it cannot be served coherently.
    pub(crate) fn whole(&self, policy: Policy, shim: bool) -> Result<Obtained<dyn WholeFunction>> {
        match self {
            Self::Vfio(address) => {
                let acquired = AcquiredFunction::acquire(*address)?;
                let facts = acquired.evidence().facts(Personality::WholeFunction, policy, shim);
                announce(address, &acquired.evidence().snoop, &facts);
                let (function, space) = acquired.into_address_space(&facts)?;
                Ok(Obtained { function: Arc::new(function), space: Arc::new(space), facts, file: address.cdev() })
            }
            Self::Emulated(machine) => {
                // No KVM is told of a function in this process, and none need be.
                let facts = Facts { personality: Personality::WholeFunction, shim: true, ..machine.facts(policy)? };
                let space = emulated_space(machine, &facts)?;
                Ok(Obtained { function: machine.whole_function(), space, facts, file: None })
            }
        }
    }
}

/// Acquires a function again that the host has had meanwhile. What was decided about the caches must still be right.
fn reacquire(address: PciAddress, space: &LiveSpace, before: &Facts) -> Result<Arc<dyn Function>> {
    let acquired = AcquiredFunction::reacquire(address, space)?;
    let facts = acquired.evidence().facts(before.personality, before.policy, before.shim);
    let (was, verdict) = (decide(before), decide(&facts));
    if verdict != was {
        bail!("{address}: its DMA was {was} and would now be {verdict}; restart this program to serve it");
    }
    let function: Arc<dyn Function> = Arc::new(acquired.into_former_address_space(space)?);
    hold_off(Arc::clone(&function), verdict).inspect_err(|_| space.release())
}

/// The address space that the verdict asks for.
fn emulated_space(machine: &Machine, facts: &Facts) -> Result<Arc<dyn AddressSpace>> {
    announce(&"emulated", &"software IOMMU", facts);
    match decide(facts) {
        Verdict::Coherent(_) => Ok(machine.space()),
        Verdict::Flush(_) => Ok(machine.staged_space()),
        Verdict::Refuse(refusal) => bail!("emulated: {refusal}"),
    }
}

/// Holds the Enable No Snoop bit off if that is the verdict.
fn hold_off(function: Arc<dyn Function>, verdict: Verdict) -> Result<Arc<dyn Function>> {
    let name = function.name().to_owned();
    no_snoop::apply(function, verdict).with_context(|| format!("{name}: clear the Enable No Snoop bit"))
}

/// Says what the decision rests on and how it comes out.
fn announce(name: &dyn Display, snoop: &dyn Display, facts: &Facts) {
    log::info!("{name}: {snoop}; {}", facts.no_snoop);
    log::info!("{name}: DMA is {}", decide(facts));
    if !facts.snoop_enforced {
        log::warn!(
            "{name}: this IOMMU does not enforce snooping; a device that uses PCI No Snoop could go behind the CPU caches"
        );
    }
}
