//! What the testbed's programs and tests share. The machine itself is `scripts/testbed`.

pub mod client;
pub mod iommu;
pub mod rights;
