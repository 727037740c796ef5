//! What moves of a function when another process takes it over, and how that process takes it.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Result, bail};

use vhost_device_vfio::acquire::hand_over::{Accepted, Exported, Served, TakeOver, accept};
use vhost_device_vfio::coherency::{Personality, Policy, decide};
use vhost_device_vfio::emulated::Machine;
use vhost_device_vfio::handover::{FunctionState, Incoming, Outgoing};
use vhost_device_vfio::iommu::KernelSpace;
use vhost_device_vfio::vfio::InterfaceChoice;
use vhost_device_vfio::vhost_user::MovableFunction;

use super::origin::{Acquired, DeviceSource, DeviceSpec, of_attached};
use super::vfio_source::second_file_of;

/// An emulated drive: its medium moves.
pub(crate) struct EmulatedDrive {
    file: Option<Arc<File>>,
    stores_data: bool,
}

impl EmulatedDrive {
    pub(crate) fn new(machine: &Machine) -> Self {
        Self { file: machine.medium_file(), stores_data: machine.stores_data() }
    }
}

impl MovableFunction for EmulatedDrive {
    fn check(&self) -> Result<(), String> {
        if self.file.is_none() && self.stores_data {
            return Err("the disk is memory of this process; give the emulated drive file=".into());
        }
        Ok(())
    }

    fn export(&mut self, outgoing: &mut Outgoing) -> Result<FunctionState, String> {
        let medium = outgoing.push_some(self.file.as_deref()).map_err(|error| error.to_string())?;
        Ok(FunctionState::Emulated { medium })
    }

    fn take_back(&mut self) {}
}

/// A VFIO function: its file and its address space move.
pub(crate) struct VfioFunction {
    served: Arc<Served>,
    exported: Option<Exported>,
}

impl VfioFunction {
    pub(crate) fn new(served: Arc<Served>) -> Self {
        Self { served, exported: None }
    }
}

impl MovableFunction for VfioFunction {
    fn check(&self) -> Result<(), String> {
        self.served.may_move().map_err(|error| error.to_string())
    }

    fn export(&mut self, outgoing: &mut Outgoing) -> Result<FunctionState, String> {
        // No command was in flight when the device stopped, so the caches are as they were flushed last.
        let exported = self.served.export(true).map_err(|error| error.to_string())?;
        let [device, iommufd] = exported.descriptors();
        let push = |outgoing: &mut Outgoing, fd| outgoing.push(fd).map_err(|error| error.to_string());
        let (device, iommufd) = (push(outgoing, device)?, push(outgoing, iommufd)?);
        let function = Box::new(exported.description().clone());
        self.exported = Some(exported);
        Ok(FunctionState::Vfio { function, device, iommufd })
    }

    fn take_back(&mut self) {
        if let Some(Err(error)) = self.exported.take().map(Exported::take_back) {
            log::error!("take the address space back: {error}");
        }
    }
}

/// Takes the function that `spec` names from another process, if `choice` admits iommufd. The second value completes that.
///
/// # Errors
/// It is of another kind, or cannot be used.
pub(crate) fn take(
    (spec, choice): (DeviceSpec, InterfaceChoice),
    state: FunctionState,
    descriptors: &mut Incoming,
    policy: Policy,
) -> Result<(Acquired, Option<TakeOver>)> {
    match (spec, state) {
        (DeviceSpec::Emulated(mut options), FunctionState::Emulated { medium }) => {
            options.adopted = descriptors.take_some(medium)?.map(|file| Arc::new(file.into()));
            let source = DeviceSource::Emulated(Box::new(Machine::new(*options)?));
            Ok((source.acquire_for_driver(policy)?, None))
        }
        (spec @ (DeviceSpec::Vfio(_) | DeviceSpec::PassedIn), FunctionState::Vfio { function, device, iommufd }) => {
            let (description, wanted) = (function, spec.in_description());
            if description.address != wanted {
                bail!("{} was handed over, not {wanted}", description.address);
            }
            if choice == InterfaceChoice::Type1 {
                bail!(
                    "{wanted}: it is handed over through iommufd, which --iommu=type1 excludes; leave that argument out"
                );
            }
            let fds = [descriptors.take(device)?, descriptors.take(iommufd)?];
            let accepted = accept(&description, fds, (Personality::Mediated, policy, false))?;
            let Accepted { name, function, space, facts, take_over } = accepted;
            log::info!("{name}: taken over with its address space; DMA is {}", decide(&facts));
            Ok((
                of_attached((name, second_file_of(name)), function, KernelSpace::Iommufd(space), facts)?,
                Some(take_over),
            ))
        }
        _ => bail!("what was handed over is another kind of function"),
    }
}
