//! Code shared by the testbed's programs and the tests. `scripts/testbed` is the emulated machine.

pub mod client;
pub mod dirty_pages;
pub mod holder;
pub mod iommu;
pub mod kept_log;
pub mod kills;
pub mod monitor;
pub mod oracle;
pub mod own_process;
pub mod random;
pub mod rights;
