//! Real workers over a disk in memory, and over the NVMe driver above the emulated controller, driven by a virtio driver in
//! the test.

mod bare;
mod coherent;
mod disk;
mod fast_path;
mod faults;
mod hostile;
mod lifecycle;
mod matrix;
mod notify;
mod nvme;
mod oracle;
mod packed;
mod packed_driver;
mod packed_hostile;
mod ranges;
mod rig;
mod round_trip;
