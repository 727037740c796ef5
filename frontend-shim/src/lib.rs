//! Lets a process outside the VMM tell KVM about a VFIO device.
//!
//! A backend that owns a VFIO device and moves data in and out of a guest's memory depends on two things that only the
//! VMM's own process can do:
//!
//! - **Register non-coherent DMA with KVM.** Otherwise KVM ignores the guest's memory types and its WBINVD. The interface is
//!   the VM's only kvm-vfio device, and KVM accepts it only from the process that created the VM.
//! - **Stop discards of guest memory** while a device can access it. After a balloon punches a hole, the guest gets a new
//!   page and the device keeps using the old one. No error is reported.
//!
//! This crate contains the small server in the VMM that does both for a backend, and the backend's [`Client`].
//!
//! ```text
//!   backend                              │  the VMM's process
//!                                        │
//!   Client ── HELLO, REGISTER(fd), … ──► │  Server ──► Registry ──► Lock       may KVM's answer change?
//!          ◄── errno, reason, Status ─── │                │
//!                                        │                └──► Vm ──► kvm-vfio device   FILE_ADD, FILE_DEL
//!                                        │                      ▲ ──► discards          none while registered
//!                                        │   the VMM's threads ─┘
//! ```
//!
//! A VMM written in Rust links this crate (`examples/vmm.rs`). A stock VMM preloads `libkvm_vfio_shim.so`, which puts the same
//! server behind hooked libc functions. The file of a registration is a *second, never-bound* open of the device. KVM accepts
//! it. It gives no access to the device while the backend has the device bound, and when the backend dies the device is
//! released.

mod budget;
mod client;
mod config;
mod explain;
mod file;
pub mod kvm;
mod listener;
pub mod lock;
mod peer;
mod registry;
mod server;
mod sys;
mod vm;
pub mod wire;

pub use client::{Client, ClientError, Registration};
pub use config::{BadVariable, Config};
pub use explain::Refused;
pub use server::Server;
pub use vm::Vm;
pub use wire::{Dma, Policy, Reason, Refusal, Status};
