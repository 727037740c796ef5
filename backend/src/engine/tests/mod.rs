//! Tests of the engine with a virtio driver in the test. The device is a disk in memory, or the NVMe driver on the emulated
//! controller.

mod bare;
mod batches;
mod cache_lines;
mod coherent;
mod crash;
mod dirty_log;
mod disk;
mod fast_path;
mod faults;
mod hand_over;
mod handle;
mod hold;
mod hostile;
mod kicks;
mod kill;
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
#[cfg(feature = "shuttle")]
mod schedules;
mod several_disks;
mod suspension;
mod traits;
mod zoned;
mod zoned_recovery;
