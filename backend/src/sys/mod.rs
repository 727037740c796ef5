//! The basement: the only room with `unsafe`. It owns what the type system cannot check — ioctls, mapped memory that a
//! guest or a device writes at any moment, device registers — and hands up values that can only be used safely.
//!
//! Memory shared with a guest or a device is never a Rust reference. A `&[u8]` promises that nobody writes while it lives,
//! and the compiler may read it twice or cache it; a guest keeps no such promise. So [`SharedMemory`] gives volatile or atomic
//! copies only, each bounds-checked, and every other room works on those copies.
#![expect(unsafe_code, reason = "the one room where it is allowed")]

mod cache;
mod inherited_fds;
mod iommufd;
mod mmio;
mod poller;
mod shared_memory;
mod sigbus;
mod signals;
mod vfio;

pub use cache::{CacheLines, Instruction};
pub use inherited_fds::{Credentials, inherit, peer_credentials, take_variable};
pub use iommufd::{DeviceId, HwInfo, HwptId, Ioas, Iommufd};
pub use mmio::Mmio;
pub use poller::{Event, Poller};
pub use shared_memory::{SharedArray, SharedMemory, Word};
pub use sigbus::{LostPages, lost_pages};
pub use signals::signal_fd;
pub use vfio::Cdev;
