//! The basement: the only room with `unsafe`. It owns what the type system cannot check — ioctls, mapped memory that a
//! guest or a device writes at any moment, device registers — and hands up values that can only be used safely.
//!
//! Memory shared with a guest or a device is never a Rust reference. A `&[u8]` promises that nobody writes while it lives,
//! and the compiler may read it twice or cache it; a guest keeps no such promise. So [`Window`] gives volatile or atomic
//! copies only, each bounds-checked, and every other room works on those copies.
#![expect(unsafe_code, reason = "the one room where it is allowed")]

mod cache;
mod inherited;
mod iommufd;
mod lost;
mod mmio;
mod poller;
mod signals;
mod vfio;
mod window;

pub use cache::{CacheLines, Instruction};
pub use inherited::{Credentials, inherit, peer_credentials, take_variable};
pub use iommufd::{DeviceId, HwInfo, HwptId, Ioas, Iommufd};
pub use lost::{Lost, lost_pages};
pub use mmio::Mmio;
pub use poller::{Event, Poller};
pub use signals::signal_fd;
pub use vfio::Cdev;
pub use window::{Rows, Window, Word};
