//! The messages about guest memory. A region has a guest-physical address and an address in the front-end, and vring
//! addresses are front-end addresses. With `GPA_ADDRESSES`, vring addresses are guest-physical and the front-end address
//! of a region is ignored.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;

use super::super::Error;
use super::super::features::ProtocolFeatures;
use super::super::vring::Vring;
use super::Session;
use super::descriptor::set_cloexec;
use crate::addr::{Address, Gpa, Qva, Span};
use crate::memory::{FileId, Plan, RegionSpec};

impl Session<'_> {
    fn uses_gpa(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::GPA_ADDRESSES)
    }

    /// The region's address in the address space that vring addresses refer to.
    fn user_address(&self, region: &VhostUserMemoryRegion) -> Qva {
        Qva(if self.uses_gpa() { region.guest_phys_addr } else { region.user_addr })
    }

    /// Checks a region. Memory that the front-end maps privately is refused.
    pub(super) fn spec(&self, region: &VhostUserMemoryRegion, file: File) -> Result<RegionSpec, Error> {
        let gpa = guest_range(region)?;
        let qva = self.user_address(region);
        let id = FileId::of(&file, gpa)?;
        let address = if self.uses_gpa() { None } else { Some(qva) };
        if self.peer.maps_privately(id, address) {
            return Err(Error::PrivateMemory { gpa });
        }
        let mut spec = RegionSpec { gpa, qva, offset: region.mmap_offset, file: Arc::new(file) };
        spec.share_file(self.memory.table().regions().iter())?;
        Ok(spec)
    }

    pub(super) fn replace_memory(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<(), Error> {
        let files = files.into_iter().map(set_cloexec);
        let specs = regions.iter().zip(files).map(|(region, file)| self.spec(region, file?));
        let specs = specs.collect::<Result<Vec<_>, _>>()?;
        self.change_memory(Plan::replacing(self.memory.table(), specs))
    }

    pub(super) fn add_memory(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<(), Error> {
        let spec = self.spec(region, set_cloexec(file)?)?;
        self.change_memory(Plan::adding(self.memory.table(), spec))
    }

    pub(super) fn remove_memory(&mut self, region: &VhostUserMemoryRegion) -> Result<(), Error> {
        let (gpa, qva) = (guest_range(region)?, self.user_address(region));
        let table = self.memory.table();
        let plan = Plan::removing(table, gpa, qva);
        let plan = plan.ok_or_else(|| Error::UnknownRegion { gpa, qva, regions: table.to_string() })?;
        self.change_memory(plan)
    }

    /// Applies `plan`. Vrings in memory that it removes are suspended meanwhile.
    fn change_memory(&mut self, plan: Plan) -> Result<(), Error> {
        if !plan.add.is_empty() {
            self.check_log_room(plan.add.iter().map(|spec| spec.gpa.last()).max())?;
            self.shim.require_registration()?;
        }
        let engine = &self.device.engine;
        let removed: Vec<Span<Gpa>> = plan.remove.iter().map(|region| region.gpa()).collect();
        let suspend = |ring: &mut Vring| ring.suspend(engine, &removed, &self.logs.memory);
        let suspended = self.rings.iter_mut().map(suspend).fold(Ok(()), Result::and);
        let changed = suspended.and_then(|()| self.memory.apply(plan));
        self.start_rings();
        self.monitor_discards();
        changed
    }
}

fn guest_range(region: &VhostUserMemoryRegion) -> Result<Span<Gpa>, Error> {
    let (start, len) = (region.guest_phys_addr, region.memory_size);
    Span::new(Gpa::from_raw(start), len).ok_or(Error::RegionRange { start, len })
}
