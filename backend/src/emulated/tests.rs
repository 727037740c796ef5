//! Drives the controller register by register, as a driver would.

mod any;
mod bring_up;
mod cache;
mod events;
mod faults;
mod host;
mod interrupts;
mod io;
mod iommu;
mod namespaces;
mod second;
mod space;
mod threads;
