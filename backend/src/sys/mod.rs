//! The only module with `unsafe`. It owns what the type system cannot check: ioctls, device registers, and mapped memory
//! that a guest or a device may write at any time. Its interface is safe.
//!
//! Memory shared with a guest or a device is never a Rust reference. A `&[u8]` asserts that nobody writes the memory while
//! the reference lives, so the compiler may cache a read or repeat it. A guest may write at any time. [`SharedMemory`]
//! therefore offers only bounds-checked volatile or atomic copies, and all other modules work on the copies.
#![expect(unsafe_code, reason = "the only module where it is allowed")]

#[cfg(test)]
pub(crate) mod attempt;
mod barrier;
mod cache;
mod device_number;
mod fork;
mod inherited_fds;
mod ioas;
mod iommufd;
mod memory_policy;
mod mmio;
mod ownership;
mod poller;
mod seccomp;
mod shared_memory;
mod sigbus;
mod signals;
mod type1;
mod vfio;
mod violation;

pub use cache::{CacheLines, Instruction};
pub use device_number::device_number;
pub use fork::fork;
pub use inherited_fds::{Credentials, inherit, peer_credentials, redirect, take_variable};
pub use ioas::Ioas;
pub use iommufd::{DeviceId, HwInfo, HwptId, Iommufd};
pub use memory_policy::PreferredNode;
pub use mmio::Mmio;
pub use ownership::{Owner, Ownership};
pub use poller::{Event, Poller};
pub use seccomp::{has_seccomp_trap, settle_allocator};
#[cfg(test)]
pub(crate) use shared_memory::kill::{before_each_store, killed_after};
pub use shared_memory::{Line, SharedArray, SharedEntry, SharedMemory, SharedRing, SharedRun, Word};
pub use sigbus::{LossCounter, LostPages, MAX_WATCHED};
pub use signals::signal_fd;
pub use type1::{Container, ContainerInfo, Group};
pub use vfio::Cdev;
pub use violation::report_violations;
