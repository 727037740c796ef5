//! An I/O address space object: one that this process has allocated, or one of an iommufd that another process has handed over.

use std::io;
use std::mem;
use std::sync::Arc;

use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};

use super::Ownership;

/// An I/O address space (IOAS) of one iommufd. It is destroyed when the last clone is dropped, unless another process owns it
/// by then.
#[derive(Clone)]
pub struct Ioas(Arc<IoasObject>);

struct IoasObject {
    iommufd: Arc<IommuFd>,
    ownership: Ownership,
    id: u32,
    /// `None` if another process has allocated it.
    allocated: Option<Arc<IommufdIoas>>,
}

impl Ioas {
    /// Allocates one (`IOMMU_IOAS_ALLOC`).
    pub(super) fn allocate(iommufd: &Arc<IommuFd>, ownership: Ownership) -> io::Result<Self> {
        let allocated = Arc::new(IommufdIoas::new(Arc::clone(iommufd)).map_err(errno)?);
        let (iommufd, id) = (Arc::clone(iommufd), allocated.id());
        Ok(Self(Arc::new(IoasObject { iommufd, ownership, id, allocated: Some(allocated) })))
    }

    /// The one with the number `id`, which another process has allocated.
    pub(super) fn existing(iommufd: &Arc<IommuFd>, ownership: Ownership, id: u32) -> Self {
        Self(Arc::new(IoasObject { iommufd: Arc::clone(iommufd), ownership, id, allocated: None }))
    }

    /// Its object number, unique within the iommufd.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0.id
    }

    /// What `vfio-ioctls` wants for a bind; `None` for one that another process has allocated.
    pub(super) fn for_bind(&self) -> Option<Arc<IommufdIoas>> {
        self.0.allocated.clone()
    }
}

impl Drop for IoasObject {
    fn drop(&mut self) {
        match (self.ownership.is_ours(), self.allocated.take()) {
            // Dropping it would destroy the object. Its reference to the iommufd stays until this process ends.
            (false, allocated) => mem::forget(allocated),
            (true, Some(allocated)) => drop(allocated),
            (true, None) => {
                if let Err(error) = self.iommufd.destroy_iommu_object(self.id).map_err(errno) {
                    log::error!("destroy the address space {}: {error}", self.id);
                }
            }
        }
    }
}

/// The errno inside an error of `iommufd-ioctls`.
pub(super) fn errno(error: IommufdError) -> io::Error {
    use IommufdError as E;
    match error {
        E::OpenIommufd(error) => error,
        E::IommuDestroy(e)
        | E::IommuIoasAlloc(e)
        | E::IommuIoasMap(e)
        | E::IommuIoasMapFile(e)
        | E::IommuIoasUnmap(e)
        | E::IommuHwptAlloc(e)
        | E::IommuGetHwInfo(e) => io::Error::from_raw_os_error(e.errno()),
        other => io::Error::other(other),
    }
}
