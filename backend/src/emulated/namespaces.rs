//! The namespaces: equal parts of one medium, all active, with the identifiers 1, 2, …

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::medium::Store;
use super::wire::Status;
use super::{EmulatedError, Options};

/// Most namespaces.
pub(super) const MOST: u16 = 128;

pub(super) struct Namespace {
    pub(super) id: u32,
    /// First byte on the medium.
    base: u64,
    /// Bytes on the medium.
    room: u64,
    /// Size of the disk, logical blocks.
    pub(super) blocks: AtomicU64,
}

/// A range of logical blocks as byte offset on the medium and length.
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// All namespaces of a controller.
pub(super) struct Namespaces(Box<[Namespace]>);

impl Namespaces {
    /// Opens the medium, and divides it.
    pub(super) fn open(options: &Options) -> Result<(Store, Self), EmulatedError> {
        let count = u64::from(options.namespaces);
        let Some(size) = options.size.checked_mul(count) else {
            return Err(EmulatedError::Option { option: "namespaces", wanted: "less in all", found: count });
        };
        let (store, size) = match &options.adopted {
            Some(file) => Store::adopt(Arc::clone(file), size)?,
            None => Store::open(&options.medium, size)?,
        };
        let lba = u64::from(options.lba);
        if size == 0 || !size.is_multiple_of(lba * count) {
            let wanted = "a file of whole logical blocks, at least one, for each namespace";
            return Err(EmulatedError::Option { option: "size", wanted, found: size });
        }
        let room = size / count;
        let namespace = |id: u32| {
            let base = u64::from(id - 1) * room;
            Namespace { id, base, room, blocks: (room / lba).into() }
        };
        Ok((store, Self((1..=u32::from(options.namespaces)).map(namespace).collect())))
    }

    pub(super) fn get(&self, id: u32) -> Option<&Namespace> {
        let index = usize::try_from(id).ok()?.checked_sub(1)?;
        self.0.get(index)
    }

    /// Size of the first, logical blocks.
    pub(super) fn blocks_of_first(&self) -> u64 {
        self.0.first().map_or(0, |namespace| namespace.blocks.load(SeqCst))
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.0.len()).expect("at most MOST")
    }

    /// Identifiers greater than `after`, in order.
    pub(super) fn ids_after(&self, after: u32) -> impl Iterator<Item = u32> {
        self.0.iter().map(|namespace| namespace.id).filter(move |id| *id > after)
    }

    /// Changes the size of namespace `id`, in bytes. A part of the medium cannot grow.
    pub(super) fn resize(&self, id: u32, bytes: u64, lba: u32, store: &Store) -> io::Result<()> {
        let namespace = self.get(id).ok_or(io::ErrorKind::NotFound)?;
        if self.count() == 1 {
            store.resize(bytes)?;
        } else if bytes > namespace.room {
            return Err(io::ErrorKind::Unsupported.into());
        }
        namespace.blocks.store(bytes / u64::from(lba), SeqCst);
        Ok(())
    }
}

impl Namespace {
    /// Where `count` blocks from `first` on are, in blocks of `lba` bytes.
    #[inline]
    pub(super) fn extent(&self, first: u64, count: u64, lba: u32) -> Result<Extent, Status> {
        let end = first.checked_add(count).ok_or(Status::LBA_OUT_OF_RANGE)?;
        if end > self.blocks.load(SeqCst) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let lba = u64::from(lba);
        Ok(Extent { offset: self.base + first * lba, len: count * lba })
    }
}
