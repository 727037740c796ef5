//! What the messages about guest memory mean. A region has an address in the guest and one in the front-end, by which
//! rings are named; with `GPA_ADDRESSES` the second is the first again, and what stands in its field means nothing.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;

use super::super::Error;
use super::super::features::ProtocolFeatures;
use super::{Session, keep_from_children};
use crate::addr::{Address, Gpa, Qva, Span};
use crate::memory::{FileId, Plan, RegionSpec};

impl Session<'_> {
    /// True if the front-end names guest addresses where it would otherwise name its own.
    fn speaks_gpa(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::GPA_ADDRESSES)
    }

    /// Where the front-end says the region is when it names the place of a ring.
    fn user_address(&self, region: &VhostUserMemoryRegion) -> Qva {
        Qva(if self.speaks_gpa() { region.guest_phys_addr } else { region.user_addr })
    }

    /// Gives the raw numbers of a region their kinds, and turns away memory that the front-end does not share with itself.
    fn spec(&self, region: &VhostUserMemoryRegion, file: File) -> Result<RegionSpec, Error> {
        let gpa = guest_range(region)?;
        let qva = self.user_address(region);
        let id = FileId::of(&file).map_err(Error::system("fstat of a memory descriptor"))?;
        let place = if self.speaks_gpa() { None } else { Some(qva) };
        if self.peer.maps_privately(id, place) {
            return Err(Error::PrivateMemory { gpa });
        }
        Ok(RegionSpec { gpa, qva, offset: region.mmap_offset, file: Arc::new(file) })
    }

    pub(super) fn replace_memory(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<(), Error> {
        let files = files.into_iter().map(keep_from_children);
        let announced = regions.iter().zip(files).map(|(region, file)| self.spec(region, file?));
        let announced = announced.collect::<Result<Vec<_>, _>>()?;
        self.change_memory(Plan::replacing(self.memory.table(), announced))
    }

    pub(super) fn add_memory(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<(), Error> {
        let spec = self.spec(region, keep_from_children(file)?)?;
        self.change_memory(Plan::adding(self.memory.table(), spec))
    }

    pub(super) fn remove_memory(&mut self, region: &VhostUserMemoryRegion) -> Result<(), Error> {
        let (gpa, qva) = (guest_range(region)?, self.user_address(region));
        let table = self.memory.table();
        let plan = Plan::removing(table, gpa, qva);
        let plan = plan.ok_or_else(|| Error::UnknownRegion { gpa, qva, regions: table.to_string() })?;
        self.change_memory(plan)
    }

    /// Carries a change of memory through, with the rings that stand in its way stopped meanwhile.
    fn change_memory(&mut self, plan: Plan) -> Result<(), Error> {
        if !plan.add.is_empty() {
            self.link.require_registration()?;
        }
        let engine = &self.device.engine;
        let gone: Vec<Span<Gpa>> = plan.remove.iter().map(|region| region.gpa()).collect();
        let stopped = self.rings.iter_mut().map(|ring| ring.suspend(engine, &gone)).fold(Ok(()), Result::and);
        let changed = stopped.and_then(|()| self.memory.apply(plan));
        self.resume_rings();
        self.monitor_discards();
        changed
    }
}

fn guest_range(region: &VhostUserMemoryRegion) -> Result<Span<Gpa>, Error> {
    let (start, len) = (region.guest_phys_addr, region.memory_size);
    Span::new(Gpa::from_raw(start), len).ok_or(Error::RegionRange { start, len })
}
