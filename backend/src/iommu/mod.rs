//! The device's address space: one live IOAS, one page table made from it for this device alone, and a ledger of what is
//! mapped there.
//!
//! A page table made explicitly (`IOMMU_HWPT_ALLOC`) outlives the attachment: what it maps is pinned before the device is
//! attached and stays pinned after it is detached. The kernel's automatic page table would be destroyed, and its pages
//! unpinned, the moment the device is detached.
//!
//! ```text
//! start   page table made ── map buffers ── attach ── bus master on
//! add     allowed? free? ── map in chunks (pinned and reachable) ── entered in the ledger
//! remove  struck out ── unmap (unreachable, then unpinned)
//! stop    bus master off, reset ── detach ── unmap ── page table destroyed
//! ```
//!
//! Chunks, because the kernel can never split a mapping; 1 GiB, because that is the largest IOMMU page.

mod ledger;

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Resource, getrlimit};
use vm_memory::{FileOffset, MmapRegion};

use crate::addr::{Address, Bytes, Iova, Span};
use crate::hardware::{AddressSpace, DmaBuffer, MapError};
use crate::memory::Region;
use crate::sys::{DeviceId, HwInfo, HwptId, Ioas, Iommufd, Window};
use ledger::Ledger;

/// The largest piece mapped by one call.
const CHUNK: u64 = 1 << 30;
/// `ECAP.SC`: the IOMMU can force snooping (VT-d 4.1 §11.4.3).
const ECAP_SC: u64 = 1 << 7;

/// The address space of one device. Buffers made from it keep it alive.
#[derive(Clone)]
pub struct LiveSpace(Arc<Live>);

struct Live {
    iommufd: Arc<Iommufd>,
    ioas: Ioas,
    page_table: HwptId,
    ledger: Mutex<Ledger>,
    snoop: Snoop,
}

/// Whether the IOMMU forces the device's DMA to snoop the CPU caches, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snoop {
    /// The kernel's answer for the page table in use (`VFIO_DMA_CC_IOMMU`).
    pub enforced: bool,
    /// What the hardware says of itself, in words; evidence only.
    pub hardware: String,
}

impl LiveSpace {
    /// Makes the page table for a bound device. Nothing is mapped, and the device is not attached.
    ///
    /// # Errors
    /// The errno of the call that failed.
    pub fn new(iommufd: Arc<Iommufd>, ioas: Ioas, device: DeviceId) -> io::Result<Self> {
        let page_table = iommufd.page_table(device, &ioas)?;
        let enforced = iommufd.snoop_enforced(&ioas, page_table)?;
        let hardware = match iommufd.hw_info(device) {
            Ok(HwInfo::IntelVtd { ecap, .. }) => format!("Intel VT-d, ECAP.SC={}", u8::from(ecap & ECAP_SC != 0)),
            Ok(HwInfo::Other(kind)) => format!("IOMMU hardware type {kind}"),
            Err(error) => format!("IOMMU hardware unknown ({error})"),
        };
        let ledger = Mutex::new(Ledger::default());
        Ok(Self(Arc::new(Live { iommufd, ioas, page_table, ledger, snoop: Snoop { enforced, hardware } })))
    }

    /// The page table to attach the device to.
    #[must_use]
    pub fn page_table(&self) -> HwptId {
        self.0.page_table
    }

    /// Whether snooping is enforced.
    #[must_use]
    pub fn snoop(&self) -> &Snoop {
        &self.0.snoop
    }
}

impl Live {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranges this address space allows now; asked each time, because attaching a device narrows them.
    fn allowed(&self, about: Span<Iova>) -> Result<Vec<Span<Iova>>, MapError> {
        let kernel = |source| MapError::Kernel { what: "IOMMU_IOAS_IOVA_RANGES for", span: about, source };
        self.iommufd.iova_ranges(&self.ioas).map_err(kernel)
    }

    /// Maps `span` piece by piece with `map`; what had been mapped is unmapped again if a piece fails.
    fn map_chunks(&self, span: Span<Iova>, map: impl Fn(Span<Iova>) -> io::Result<()>) -> Result<(), MapError> {
        let mut progress = Progress::new(span);
        for chunk in span.chunks(CHUNK) {
            if let Err(error) = map(chunk) {
                if let Some(done) = Span::new(span.start(), chunk.start().raw() - span.start().raw()) {
                    self.unmap_chunks(done)?;
                }
                return Err(self.explain(chunk, error));
            }
            progress.tick(chunk);
        }
        Ok(())
    }

    fn unmap_chunks(&self, span: Span<Iova>) -> Result<(), MapError> {
        for chunk in span.chunks(CHUNK) {
            let kernel = |source| MapError::Kernel { what: "IOMMU_IOAS_UNMAP", span: chunk, source };
            self.iommufd.unmap(&self.ioas, chunk).map_err(kernel)?;
        }
        Ok(())
    }

    /// Pins one piece of a region's file, or of this process's view of it where the kernel cannot pin the file.
    fn map_piece(&self, region: &Region, chunk: Span<Iova>) -> io::Result<()> {
        let inside = chunk.start().raw() - region.gpa().identity_iova().start().raw();
        if region.pinnable() {
            let mapped = self.iommufd.map_file(&self.ioas, region.file().as_fd(), region.offset() + inside, chunk);
            match mapped {
                // Linux before 6.13 does not know the call.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
                other => return other,
            }
        }
        let offset = usize::try_from(inside).map_err(io::Error::other)?;
        self.iommufd.map_window(&self.ioas, region.window(), offset, chunk)
    }

    /// Turns ENOMEM into the limit it stands for, if that is what it is.
    fn explain(&self, span: Span<Iova>, error: io::Error) -> MapError {
        let limit = getrlimit(Resource::Memlock).current;
        let pinned: u64 = self.ledger().spans().map(|span| span.len()).sum();
        let needed = pinned.saturating_add(span.len());
        match limit {
            Some(limit) if error.raw_os_error() == Some(libc::ENOMEM) && needed > limit => {
                MapError::MemLock { span, needed_kib: needed / 1024, allowed_kib: limit / 1024 }
            }
            _ => MapError::Kernel { what: "pin and map for DMA", span, source: error },
        }
    }
}

impl AddressSpace for LiveSpace {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        let span = region.gpa().identity_iova();
        let allowed = self.0.allowed(span)?;
        if !allowed.iter().any(|range| range.covers(&span)) {
            return Err(MapError::NotAllowed { span, allowed: list(&allowed) });
        }
        if let Some(taken) = self.0.ledger().conflict(span) {
            return Err(MapError::Overlap { span, taken });
        }
        self.0.map_chunks(span, |chunk| self.0.map_piece(region, chunk))?;
        self.0.ledger().enter(span);
        Ok(())
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        let span = region.gpa().identity_iova();
        if !self.0.ledger().strike(span) {
            return Err(MapError::NotMapped { span });
        }
        self.0.unmap_chunks(span).inspect_err(|_| self.0.ledger().enter(span))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let failed = |source| MapError::Allocate { bytes, source };
        let page = rustix::param::page_size();
        let len = bytes.checked_next_multiple_of(page).ok_or(MapError::NoIova(bytes))?;
        let file = memfd_create("vhost-device-vfio-dma", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        ftruncate(&file, len as u64).map_err(|e| failed(e.into()))?;
        let place = FileOffset::new(file.into(), 0);
        let mapping = MmapRegion::from_file(place.clone(), len).map_err(|e| failed(io::Error::other(e)))?;
        let window = Window::of(Arc::new(mapping));

        let zero = Span::new(Iova(0), len as u64).ok_or(MapError::NoIova(bytes))?;
        let allowed = self.0.allowed(zero)?;
        let mut ledger = self.0.ledger();
        let span = ledger.highest_gap(&allowed, len as u64, page as u64).ok_or(MapError::NoIova(bytes))?;
        let mapped = match self.0.iommufd.map_file(&self.0.ioas, place.file().as_fd(), 0, span) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.0.iommufd.map_window(&self.0.ioas, &window, 0, span)
            }
            other => other,
        };
        if let Err(error) = mapped {
            drop(ledger);
            return Err(self.0.explain(span, error));
        }
        ledger.enter(span);
        drop(ledger);
        Ok(DmaBuffer::new(window, span, Box::new(Mapped { space: Arc::clone(&self.0), span })))
    }
}

impl Drop for Live {
    /// The device has been detached by now (see `vfio::Attached`), so nothing here can pull memory from under its DMA.
    fn drop(&mut self) {
        let spans: Vec<_> = self.ledger().spans().collect();
        for span in spans {
            if let Err(error) = self.unmap_chunks(span) {
                log::error!("{error}");
            }
        }
        if let Err(error) = self.iommufd.destroy_page_table(self.page_table) {
            log::error!("destroy the page table: {error}");
        }
    }
}

/// A buffer's mapping; taken away on drop.
struct Mapped {
    space: Arc<Live>,
    span: Span<Iova>,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(error) = self.space.unmap_chunks(self.span) {
            log::error!("{error}");
        }
        self.space.ledger().strike(self.span);
    }
}

/// Tells a person once a second how far a long map has come; the virtual machine stands still meanwhile.
struct Progress {
    whole: Span<Iova>,
    reported: Instant,
}

impl Progress {
    fn new(whole: Span<Iova>) -> Self {
        Self { whole, reported: Instant::now() }
    }

    fn tick(&mut self, done: Span<Iova>) {
        if self.reported.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.reported = Instant::now();
        let bytes = done.last().raw() - self.whole.start().raw() + 1;
        log::info!("mapping {}: {} of {}", self.whole, Bytes(bytes), Bytes(self.whole.len()));
    }
}

fn list(spans: &[Span<Iova>]) -> String {
    let words: Vec<_> = spans.iter().map(|span| format!("{}-{}", span.start(), span.last())).collect();
    words.join(", ")
}
