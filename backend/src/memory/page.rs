//! The page size of this host: 4 KiB, or on Arm also 16 or 64 KiB.

/// A page size that a host can have. Memory is mapped and pinned in units of it, whatever the page size of the guest is: VFIO
/// maps no part of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage(u64);

impl HostPage {
    /// That of the running system.
    #[must_use]
    pub fn of_system() -> Self {
        Self(rustix::param::page_size() as u64)
    }

    /// Another one.
    #[cfg(test)]
    pub(crate) const fn of(bytes: u64) -> Self {
        assert!(bytes.is_power_of_two() && bytes >= 4096);
        Self(bytes)
    }

    /// Bytes.
    #[inline]
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::HostPage;
    use crate::addr::IovaSlice;
    use crate::addr::{Gpa, Qva, Span};
    use crate::memory::region::{Region, RegionSpec, Unit};
    use crate::memory::{MemTable, RegionError};

    const HOST: HostPage = HostPage::of(64 << 10);

    /// A region of a file of 256 KiB.
    fn map(unit: Unit, gpa: u64, len: u64, offset: u64) -> Result<Region, RegionError> {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 256 << 10).unwrap();
        let gpa = Span::new(Gpa(gpa), len).unwrap();
        let spec = RegionSpec { gpa, qva: Qva(gpa.start().0), offset, file: Arc::new(File::from(fd)) };
        Region::map_as(spec, IovaSlice::WHOLE, true, unit, HOST)
    }

    #[test]
    fn a_region_of_a_guest_with_4_kib_pages_must_fit_the_hosts_64_kib() {
        for unit in [Unit::PageOfFile, Unit::PageOfHost] {
            assert!(map(unit, 0x1_0000, 0x2_0000, 0x1_0000).is_ok());
            for (gpa, offset) in [(0x1000, 0), (0x1_0000, 0x1000), (0x1000, 0x1000)] {
                let refused = map(unit, gpa, 0x1_0000, offset).err().expect("refused").to_string();
                assert!(refused.contains("page size of 64K, in which this host's kernel maps it"), "{refused}");
            }
        }
    }

    #[test]
    fn two_regions_in_one_page_of_the_host_are_refused() {
        let first = map(Unit::PageOfFile, 0x1_0000, 0x1000, 0).unwrap();
        assert_eq!(first.gpa().len(), HOST.bytes(), "extended to the end of the host's page");
        let second = map(Unit::PageOfFile, 0x1_0000, 0x1000, 0x1_0000).unwrap();

        let table = MemTable::new(vec![Arc::new(first), Arc::new(second)]);

        assert!(matches!(table, Err(RegionError::Overlap { .. })));
    }

    #[test]
    fn a_guest_with_64_kib_pages_fits_a_host_with_4_kib() {
        let region = |unit| {
            let file = Arc::new(File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()));
            ftruncate(&*file, 256 << 10).unwrap();
            let spec =
                RegionSpec { gpa: Span::new(Gpa(0x1_0000), 0x2_0000).unwrap(), qva: Qva(0), offset: 0x1_0000, file };
            Region::map_as(spec, IovaSlice::WHOLE, true, unit, HostPage::of(4096))
        };
        assert_eq!(region(Unit::PageOfFile).unwrap().gpa().len(), 0x2_0000);
        assert_eq!(region(Unit::PageOfHost).unwrap().gpa().len(), 0x2_0000);
    }
}
