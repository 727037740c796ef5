//! Detects that guest memory is discarded under a device, where nothing prevents it. A vhost-user back-end cannot stop a
//! balloon, free page reporting or virtio-mem. Such a discard punches a hole into the memory file: the guest gets a new page
//! there, while the device keeps using the old, pinned page. No error is reported anywhere.
//!
//! Pinning allocates all of a region, so if its file has fewer blocks later, memory has been discarded. The check is periodic
//! and misses a page that is discarded and touched again between two checks. Balloons discard repeatedly, so a later check
//! finds them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::fstat;

use crate::addr::Bytes;
use crate::memory::{FileId, MemTable, Region};
use crate::rate_limited_log::{Limit, SharedLog};

/// A front-end can have many files, and can connect again.
static ALARMS: SharedLog = SharedLog::with_limit(module_path!(), Limit::CONNECTIONS);

/// Time between two checks: one `fstat` per file and second costs nothing.
const PERIOD: Duration = Duration::from_secs(1);
/// The unit of `st_blocks`, on every file system (stat(3type)), in bytes.
const BLOCK: u64 = 512;

/// The memory files of one front-end, and how much of each was allocated.
#[derive(Default)]
pub(crate) struct DiscardMonitor {
    files: Vec<MemoryFile>,
    /// Files that have been reported, each once.
    reported: Vec<FileId>,
    next: Option<Instant>,
}

/// A file and the guest regions in it.
struct MemoryFile {
    regions: Vec<Arc<Region>>,
    /// Allocated when last checked, in bytes.
    allocated: u64,
}

impl DiscardMonitor {
    /// Watches the memory in `table` from now on, and no other. All of it must be pinned.
    pub(crate) fn follow(&mut self, table: &MemTable) {
        self.files.clear();
        for region in table.regions().iter().filter(|region| !self.reported.contains(&region.id())) {
            match self.files.iter_mut().find(|file| file.id() == region.id()) {
                Some(file) => file.regions.push(Arc::clone(region)),
                None => self.files.extend(MemoryFile::new(Arc::clone(region))),
            }
        }
        self.next = (!self.files.is_empty()).then(|| Instant::now() + PERIOD);
    }

    /// Watches nothing until the next [`Self::follow`].
    pub(crate) fn pause(&mut self) {
        self.follow(&MemTable::default());
    }

    /// When the next check is due; `None` while nothing is watched.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Runs the check if it is due: logs each file that has lost memory, and returns their number. `pinned` is false while the
    /// device is released; a discard does no harm then.
    pub(crate) fn look(&mut self, now: Instant, pinned: bool) -> usize {
        if self.next.is_none_or(|next| now < next) {
            return 0;
        }
        if !pinned {
            self.next = Some(now + PERIOD);
            // Pinning will allocate all of it again.
            self.files.iter_mut().for_each(|file| file.allocated = 0);
            return 0;
        }
        let before = self.files.len();
        self.files.retain_mut(|file| {
            let lost = file.update_lost();
            if lost > 0 {
                ALARMS.error(|| alarm(&file.regions, lost));
                self.reported.push(file.id());
            }
            lost == 0
        });
        self.next = (!self.files.is_empty()).then_some(now + PERIOD);
        before - self.files.len()
    }
}

impl MemoryFile {
    fn new(region: Arc<Region>) -> Option<Self> {
        let allocated = allocated(&region)?;
        Some(Self { regions: vec![region], allocated })
    }

    fn id(&self) -> FileId {
        self.regions[0].id()
    }

    /// Bytes that have been discarded.
    fn update_lost(&mut self) -> u64 {
        let now = allocated(&self.regions[0]).unwrap_or(self.allocated);
        let lost = self.allocated.saturating_sub(now);
        // Allocation grows when the VMM touches parts of the file that are not guest memory.
        self.allocated = self.allocated.max(now);
        lost
    }
}

/// Bytes allocated in the region's file; `None` if `fstat` fails.
fn allocated(region: &Region) -> Option<u64> {
    let blocks = fstat(region.file()).ok()?.st_blocks;
    u64::try_from(blocks).ok()?.checked_mul(BLOCK)
}

fn alarm(regions: &[Arc<Region>], lost: u64) -> String {
    let places: Vec<String> = regions.iter().map(|region| region.gpa().to_string()).collect();
    format!(
        "guest memory is being discarded under the device: {} of region {} (file {}) are gone. The guest has new pages \
         there, while the device keeps using the old ones: its reads and writes there are wrong, without an error. Stop \
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

    /// An allocated file, as after pinning.
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
    fn a_hole_is_reported_once_and_other_files_are_still_watched() {
        let (one, other) = (file(2 * MIB), file(MIB));
        let regions = [region(&one, 0, 0), region(&one, 4 * MIB, MIB), region(&other, 8 * MIB, 0)];
        let mut watch = DiscardMonitor::default();
        watch.follow(&table(&[&regions[0], &regions[1], &regions[2]]));
        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "nothing has happened");

        punch(&one, MIB);

        assert_eq!(watch.look(watch.next().unwrap(), true), 1);
        punch(&one, 0);
        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "already reported");
        watch.follow(&table(&[&regions[0], &regions[2]]));
        punch(&one, 4096);
        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "already reported, even after the table has changed");
        punch(&other, 0);
        assert_eq!(watch.look(watch.next().unwrap(), true), 1);
        assert_eq!(watch.next(), None, "every file has been reported");
    }

    #[test]
    fn nothing_is_checked_before_it_is_due_or_without_memory() {
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
    fn a_hole_while_nothing_is_pinned_is_not_reported() {
        let file = file(MIB);
        let mut watch = DiscardMonitor::default();
        watch.follow(&table(&[&region(&file, 0, 0)]));

        punch(&file, 0);
        assert_eq!(watch.look(watch.next().unwrap(), false), 0, "the device is released");

        assert_eq!(watch.look(watch.next().unwrap(), true), 0, "it is back, with the guest's new page pinned");
        punch(&file, 4096);
        assert_eq!(watch.look(watch.next().unwrap(), true), 1);
    }

    #[test]
    fn a_hole_in_memory_that_was_removed_is_not_reported() {
        let file = file(MIB);
        let mut watch = DiscardMonitor::default();
        watch.follow(&table(&[&region(&file, 0, 0)]));
        watch.follow(&MemTable::default());
        punch(&file, 0);
        assert_eq!(watch.look(Instant::now() + 2 * PERIOD, true), 0);
    }

    #[test]
    fn the_alarm_names_the_region_the_size_and_the_fix() {
        let file = file(2 * MIB);
        let text = alarm(&[region(&file, 0, 0), region(&file, 4 << 30, MIB)], 8192);
        for part in ["8K of region 0x0+1M or 0x100000000+1M", "virtio-balloon", "free-page-reporting", "--kvm-socket"] {
            assert!(text.contains(part), "{part} in: {text}");
        }
    }
}
