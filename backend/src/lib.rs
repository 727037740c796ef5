//! A process that owns a VFIO device and serves it to a virtual machine over a socket: as a disk (vhost-user-blk), or as a whole
//! PCI function (vfio-user).
//!
//! Guest RAM is mapped once into an iommufd address space, so the device reads and writes it directly. `ARCHITECTURE.md` beside
//! this crate describes the modules and the data paths:
//!
//! ```text
//! message   vhost_user::Session -> memory::Plan -> hardware::AddressSpace -> sys -> /dev/iommu       then the ack
//! kick      engine::Worker -> engine::Request -> driver::Queue::submit .. ring -> Registers          no lock, no copy
//! register  vfio_user::Session -> passthrough::Assignment -> whole_function::WholeFunction -> sys    or mapped into the guest
//! ```

#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests make small numbers"))]

#[cfg(not(all(target_os = "linux", target_endian = "little", target_pointer_width = "64")))]
compile_error!("vhost-device-vfio needs 64-bit little-endian Linux");

pub mod acquire;
pub mod addr;
pub mod board;
pub mod cdi;
pub mod coherency;
pub mod config;
pub mod control;
pub mod doctor;
pub mod driver;
pub mod emulated;
pub mod engine;
mod eventfd;
pub mod foreign_fd;
pub mod handover;
pub mod hardware;
pub mod helper;
pub mod inspect;
pub mod iommu;
pub mod kvm;
pub mod local_server;
pub mod memory;
pub mod metrics;
pub mod passthrough;
pub mod placement;
pub mod qmp;
mod rate_limited_log;
pub mod sandbox;
pub mod service_manager;
pub mod socket;
mod sync;
pub mod sys;
pub mod vfio;
pub mod vfio_user;
pub mod vhost_user;
pub mod whole_function;
