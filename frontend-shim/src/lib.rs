//! Lets a process outside the VMM tell KVM about a VFIO device.
//!
//! A backend that owns a VFIO device and moves data in and out of a guest's memory depends on two things that only the
//! VMM's own process can do:
//!
//! - **KVM must know of DMA that goes behind the processors' caches.** Else it ignores the guest's memory types and its
//!   WBINVD. KVM learns of it through the VM's one kvm-vfio device, and serves no process but the one that made the VM.
//! - **Guest memory must not be discarded** while a device reaches it. A balloon's hole gives the guest a new page; the
//!   device goes on using the old one, and no error tells anyone.
//!
//! This crate is the small server in the VMM that does both for a backend, and the backend's [`Client`].
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
//! A VMM written in Rust links this crate (`examples/vmm.rs`); a stock one preloads `libkvm_vfio_shim.so`, which is the
//! same behind hooked libc functions. A registration's file is a *second, never-bound* open of the device: KVM takes it, it
//! gives no right to the device while its owner holds it, and when the owner dies the device is released.

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
