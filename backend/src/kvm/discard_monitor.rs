//! Notices that guest memory is discarded under a device, where nothing keeps it from being so. vhost-user has no message
//! by which to stop a balloon, free page reporting or virtio-mem. Such a discard punches a hole into the memory file: the
//! guest gets a new page there, the device goes on using the old, pinned one, and no error tells anyone.
//!
//! All of a region is allocated when it has been pinned. So a file that has fewer blocks later has lost some of it. Only
//! looking from time to time, this misses a page that was discarded and touched again in between; but whoever discards
//! memory does so again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::fstat;

use crate::addr::Bytes;
use crate::memory::{FileId, MemTable, Region};

/// From one look to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// `st_blocks` counts in these, whatever the file system (stat(3type)).
const BLOCK: u64 = 512;

/// The memory files of one front-end, and how much of each was allocated.
#[derive(Default)]
pub(crate) struct DiscardMonitor {
    files: Vec<Watched>,
    /// Files about which there was an alarm; one is enough.
    reported: Vec<FileId>,
    next: Option<Instant>,
}

/// The regions that lie in one file.
struct Watched {
    regions: Vec<Arc<Region>>,
    /// Bytes.
    allocated: u64,
}

impl DiscardMonitor {
    /// Watches the memory in `table` from now on, and no other. All of it is pinned.
    pub(crate) fn follow(&mut self, table: &MemTable) {
        self.files.clear();
        for region in table.regions().iter().filter(|region| !self.reported.contains(&region.id())) {
            match self.files.iter_mut().find(|watched| watched.id() == region.id()) {
                Some(watched) => watched.regions.push(Arc::clone(region)),
                None => self.files.extend(Watched::new(Arc::clone(region))),
            }
        }
        self.next = (!self.files.is_empty()).then(|| Instant::now() + PERIOD);
    }

    /// Watches nothing for now.
    pub(crate) fn pause(&mut self) {
        self.follow(&MemTable::default());
    }

    /// When to look next; `None` while there is nothing to look at.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Looks if it is time to, and raises the alarm about each file that has lost memory. Returns how many have. While
    /// nothing is `pinned`, because the device is away, nothing can be lost.
    pub(crate) fn look(&mut self, now: Instant, pinned: bool) -> usize {
        if self.next.is_none_or(|next| now < next) {
            return 0;
        }
        if !pinned {
            self.next = Some(now + PERIOD);
            // All of it will be allocated again when it is pinned again.
            self.files.iter_mut().for_each(|watched| watched.allocated = 0);
            return 0;
        }
        let before = self.files.len();
        self.files.retain_mut(|watched| {
            let lost = watched.lost();
            if lost > 0 {
                log::error!("{}", alarm(&watched.regions, lost));
                self.reported.push(watched.id());
            }
            lost == 0
        });
        self.next = (!self.files.is_empty()).then_some(now + PERIOD);
        before - self.files.len()
    }
}

impl Watched {
    fn new(region: Arc<Region>) -> Option<Self> {
        let allocated = allocated(&region)?;
        Some(Self { regions: vec![region], allocated })
    }

    fn id(&self) -> FileId {
        self.regions[0].id()
    }

    /// How many bytes of the file are gone.
    fn lost(&mut self) -> u64 {
        let now = allocated(&self.regions[0]).unwrap_or(self.allocated);
        let lost = self.allocated.saturating_sub(now);
        // More, when the VMM touches parts of the file that are no guest memory.
        self.allocated = self.allocated.max(now);
        lost
    }
}

/// Bytes allocated in the region's file, if the kernel says.
fn allocated(region: &Region) -> Option<u64> {
    let blocks = fstat(region.file()).ok()?.st_blocks;
    u64::try_from(blocks).ok()?.checked_mul(BLOCK)
}

fn alarm(regions: &[Arc<Region>], lost: u64) -> String {
    let places: Vec<String> = regions.iter().map(|region| region.gpa().to_string()).collect();
    format!(
        "guest memory is being discarded under the device: {} of region {} (file {}) are gone. The guest has new pages \
         there, the device goes on using the old ones, and no error will tell: what it reads and writes there is lost. Stop \
         the VM; remove virtio-balloon, free-page-reporting and virtio-mem from it, or start the VMM with \
         LD_PRELOAD=libkvm_vfio_shim.so KVM_VFIO_SHIM_SOCKET=PATH and give --kvm-socket PATH",
        Bytes(lost),
        places.join(" or "),
        regions[0].id()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gpa, Qva, Span};
    use crate::memory::RegionSpec;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use std::fs::File;

    const MIB: u64 = 1 << 20;

    /// Memory that is there, as it is after pinning.
    fn file(bytes: u64) -> Arc<File> {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
        Arc::new(file.into())
    }

    fn region(file: &Arc<File>, at: u64, offset: u64) -> Arc<Region> {
        let gpa = Span::new(Gpa(at), MIB).unwrap();
        Arc::new(Region::map(RegionSpec { gpa, qva: Qva(at), offset, file: Arc::clone(file) }).unwrap())
    }

    fn table(regions: &[&Arc<Region>]) -> MemTable {
        MemTable::new(regions.iter().map(|region| Arc::clone(region)).collect()).unwrap()
    }

    fn punch(file: &File, offset: u64) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, hole, offset, 4096).unwrap();
    }

    #[test]
    fn a_hole_is_reported_once_and_other_files_are_watched_on() {
        let (one, other) = (file(2 * MIB), file(MIB));
        let regions = [region(&one, 0, 0), region(&one, 4 * MIB, MIB), region(&other, 8 * MIB, 0)];
        let mut watch = DiscardMonitor::default();
        watch.follow(&table(&[&regions[0], &regions[1], &regions[2]]));
        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "nothing has happened");

        punch(&one, MIB);

        assert_eq!(watch.look(watch.next().unwrap(), true), 1);
        punch(&one, 0);
        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "known");
        watch.follow(&table(&[&regions[0], &regions[2]]));
        punch(&one, 4096);
        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "known, after a change of memory, too");
        punch(&other, 0);
        assert_eq!(watch.look(watch.next().unwrap(), true), 1);
        assert_eq!(watch.next(), None, "there is nothing left to learn");
    }

    #[test]
    fn nothing_is_looked_at_before_its_time_or_without_memory() {
        let file = file(MIB);
        let mut watch = DiscardMonitor::default();
        assert_eq!(watch.next(), None);
        watch.follow(&table(&[&region(&file, 0, 0)]));
        punch(&file, 0);
        assert_eq!(watch.look(watch.next().unwrap() - PERIOD / 2, true), 0);
        assert_eq!(watch.look(watch.next().unwrap(), true), 1);

        watch.follow(&MemTable::default());
        assert_eq!(watch.next(), None);
    }

    #[test]
    fn a_hole_while_nothing_is_pinned_is_nobodys_loss() {
        let file = file(MIB);
        let mut watch = DiscardMonitor::default();
        watch.follow(&table(&[&region(&file, 0, 0)]));

        punch(&file, 0);
        assert_eq!(watch.look(watch.next().unwrap(), false), 0, "the device is away");

        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "it is back, and has the guest's own page");
        punch(&file, 4096);
        assert_eq!(watch.look(watch.next().unwrap(), true), 1);
    }

    #[test]
    fn a_hole_under_memory_that_was_removed_is_nobodys_loss() {
        let file = file(MIB);
        let mut watch = DiscardMonitor::default();
        watch.follow(&table(&[&region(&file, 0, 0)]));
        watch.follow(&MemTable::default());
        punch(&file, 0);
        assert_eq!(watch.look(Instant::now() + 2 * PERIOD, true), 0);
    }

    #[test]
    fn the_alarm_names_place_size_loss_and_the_ways_out() {
        let file = file(2 * MIB);
        let text = alarm(&[region(&file, 0, 0), region(&file, 4 << 30, MIB)], 8192);
        for part in ["8K of region 0x0+1M or 0x100000000+1M", "virtio-balloon", "free-page-reporting", "--kvm-socket"] {
            assert!(text.contains(part), "{part} in: {text}");
        }
    }
}
