//! The address space as the successor receives it: numbers of objects in an iommufd, checked against the kernel.

use std::io;
use std::sync::{Arc, Weak};

use super::hand_over_state::{HandOver, State};
use super::mapped_memory::{CHUNK, MappedMemory};
use super::page_table::PageTable;
use super::second::Twin;
use super::space_description::{HandOverError, SpaceDescription, StagingDescription, wrong};
use super::staging::Staging;
use super::{Attachment, Live, LiveSpace};
use crate::sys::{CacheLines, Cdev, Iommufd};

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> HandOverError {
    move |source| HandOverError::Kernel { what, source }
}

impl LiveSpace {
    /// The space that `description` describes, in an iommufd that was received with it. `table` is its page table, `device` is
    /// attached to that, and `lines` is what a flushing regime flushes with.
    ///
    /// # Errors
    /// See [`HandOverError`]; nothing has changed.
    pub(crate) fn handed_over(
        description: &SpaceDescription,
        table: &Arc<PageTable>,
        device: Weak<Cdev>,
        lines: Option<CacheLines>,
    ) -> Result<Self, HandOverError> {
        let staging = match (&description.staging, lines) {
            (None, _) => None,
            (Some(_), None) => return Err(wrong("it flushes, and this processor cannot flush its caches")),
            (Some(staging), Some(lines)) => Some(Staging::handed_over(staging, table, lines)?),
        };
        let (iommufd, ioas) = (Arc::clone(table.iommufd()), table.ioas());
        let allowed = iommufd.iova_ranges(&ioas).map_err(failed("IOMMU_IOAS_IOVA_RANGES"))?;
        let inherited = description.check(&allowed)?;
        let absent = iommufd.not_mapped(&ioas, &inherited.pieces).map_err(failed("check what is mapped"))?;
        if let Some(span) = absent {
            return Err(HandOverError::Description(format!("{span} is not mapped as it says")));
        }
        let mapped = MappedMemory::new(staging.is_some(), CHUNK);
        inherited.pieces.iter().for_each(|(span, _)| mapped.inherit(*span));
        let hand_over = HandOver::of(State {
            attachment: Some((table.device(), table.id())),
            inherited: inherited.regions,
            foreign: inherited.buffers,
            window: Some(inherited.window),
            flushed: description.staging.as_ref().is_none_or(|staging| staging.flushed),
            accounted: description.accounted,
            ..State::default()
        });
        let attachment = Attachment { file: device, table: Arc::downgrade(table) };
        Ok(Self(Arc::new(Live::new(table, attachment, (staging, mapped), hand_over, Twin::default()))))
    }
}

impl Staging {
    fn handed_over(
        description: &StagingDescription,
        table: &PageTable,
        lines: CacheLines,
    ) -> Result<Self, HandOverError> {
        let ioas = table.iommufd().existing_ioas(description.ioas).map_err(failed("look up the staging space"))?;
        let staged = PageTable::existing(table.iommufd(), &ioas, table.device(), description.page_table);
        let staged = staged.map_err(failed("look up the staging page table"))?;
        Ok(Self::new(lines, ioas, staged))
    }
}

impl PageTable {
    /// The page table of a device, in an iommufd that was received with `space`.
    ///
    /// # Errors
    /// The number that names no such object, and its errno.
    pub(crate) fn handed_over(iommufd: &Arc<Iommufd>, space: &SpaceDescription) -> Result<Self, HandOverError> {
        let ioas = iommufd.existing_ioas(space.ioas).map_err(failed("look up the address space"))?;
        let device = iommufd.existing_device(space.device).map_err(failed("look up the device"))?;
        Self::existing(iommufd, &ioas, device, space.page_table).map_err(failed("look up the page table"))
    }
}
