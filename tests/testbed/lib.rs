//! Code shared by the testbed's programs and the tests. `scripts/testbed` is the emulated machine.

pub mod client;
pub mod holder;
pub mod iommu;
pub mod monitor;
pub mod own_process;
pub mod rights;
