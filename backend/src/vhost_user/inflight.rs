//! The memory in which requests in flight are recorded, as the front-end keeps it (vhost-user: "Inflight I/O tracking"). The
//! engine has the format of one virtqueue's region; this is where the regions are.
//!
//! The text puts the regions one after the other and says nothing of gaps. libvhost-user and DPDK align each to 64 bytes, and so
//! does this back-end. Regions without gaps are recognized by their size.

use std::fs::File;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;

use super::Error;
use crate::engine::{InflightRegion, Layout};
use crate::memory::map_shared_file;
use crate::rate_limited_log::SharedLog;
use crate::sys::SharedMemory;

/// Alignment of each region, bytes.
const ALIGNMENT: usize = 64;

/// Bytes from one region to the next.
fn stride(layout: Layout, entries: u16) -> u64 {
    InflightRegion::bytes(layout, entries).next_multiple_of(ALIGNMENT) as u64
}

/// The numbers of a message, and the limits for them.
pub(super) struct Request {
    /// The name of the message.
    pub(super) name: &'static str,
    /// Virtqueues of the device.
    pub(super) queues: u16,
    /// Split or packed; `None` before SET_FEATURES.
    pub(super) layout: Option<Layout>,
}

impl Request {
    fn check(&self, message: &VhostUserInflight) -> Result<(), Error> {
        let VhostUserInflight { num_queues: found, queue_size: size, .. } = *message;
        let Self { name: request, queues, layout } = *self;
        if found == 0 || found > queues {
            return Err(Error::InflightQueues { request, found, queues });
        }
        let layout = layout.unwrap_or(Layout::Packed);
        if layout.allows(size) { Ok(()) } else { Err(Error::InflightSize { request, size, layout }) }
    }

    /// A new file of zeroes for the regions, and its description. Before SET_FEATURES it has room for either layout.
    pub(super) fn make(&self, message: &VhostUserInflight) -> Result<(VhostUserInflight, File), Error> {
        self.check(message)?;
        let VhostUserInflight { num_queues, queue_size, .. } = *message;
        let bytes = u64::from(num_queues) * stride(self.layout.unwrap_or(Layout::Packed), queue_size);
        let file = memfd_create("vhost-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(Error::system("create a memfd for the inflight regions"))?;
        ftruncate(&file, bytes).map_err(Error::system("size the inflight regions"))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(Error::system("seal the inflight regions"))?;
        Ok((VhostUserInflight { mmap_size: bytes, mmap_offset: 0, num_queues, queue_size }, file.into()))
    }

    /// Maps the regions in `file`.
    pub(super) fn map<'d>(
        &self,
        message: &VhostUserInflight,
        file: File,
        log: &'d SharedLog,
    ) -> Result<InflightRegions<'d>, Error> {
        self.check(message)?;
        let VhostUserInflight { mmap_size: found, mmap_offset, num_queues: queues, queue_size: entries } = *message;
        let each = InflightRegion::bytes(self.layout.unwrap_or(Layout::Split), entries) as u64;
        let needed = u64::from(queues) * each;
        if found < needed {
            return Err(Error::InflightBytes { queues, entries, needed, found });
        }
        // More than the larger layout needs is never used.
        let len = found.min(u64::from(queues) * stride(Layout::Packed, entries));
        let kept = file.try_clone().map_err(Error::system("duplicate the file of the inflight regions"))?;
        let memory = map_shared_file(file, mmap_offset, len)?;
        let source = (kept, mmap_offset);
        Ok(InflightRegions { memory, source, bytes: found, queues, entries, layout: self.layout, log })
    }
}

/// The regions of all virtqueues.
pub(super) struct InflightRegions<'d> {
    memory: SharedMemory,
    /// The file, and the offset in the message.
    source: (File, u64),
    /// Size in the message.
    bytes: u64,
    queues: u16,
    /// Descriptors for which each region has room.
    entries: u16,
    /// That of the rings when the front-end set the regions; `None` before SET_FEATURES.
    layout: Option<Layout>,
    log: &'d SharedLog,
}

impl InflightRegions<'_> {
    /// The region of virtqueue `index`. `None` if it has none, or one for another kind of ring.
    pub(super) fn of(&self, index: usize, size: u16, layout: Layout) -> Option<InflightRegion> {
        let fits = size <= self.entries && self.layout.is_none_or(|known| known == layout);
        let region = fits.then(|| self.find(index, layout)).flatten();
        if region.is_none() {
            self.log.warn(|| {
                let Self { queues, entries, .. } = self;
                format!(
                    "virtqueue {index}: SET_INFLIGHT_FD was for {queues} virtqueues of {entries} descriptors, and not for \
                     this {layout} ring of {size}; a crash may lose its requests"
                )
            });
        }
        region
    }

    /// The regions as the front-end announced them, and their file.
    pub(super) fn announced(&self) -> (&File, VhostUserInflight) {
        let (file, mmap_offset) = &self.source;
        let Self { bytes: mmap_size, queues: num_queues, entries: queue_size, .. } = *self;
        (file, VhostUserInflight { mmap_size, mmap_offset: *mmap_offset, num_queues, queue_size })
    }

    fn find(&self, index: usize, layout: Layout) -> Option<InflightRegion> {
        if index >= usize::from(self.queues) {
            return None;
        }
        let (exact, queues) = (InflightRegion::bytes(layout, self.entries), u64::from(self.queues));
        let aligned = stride(layout, self.entries);
        let stride = if self.bytes < queues * aligned { exact } else { usize::try_from(aligned).ok()? };
        let memory = self.memory.slice(index * stride, exact)?;
        InflightRegion::new(memory, layout, self.entries)
    }
}
