//! Real workers over a disk in memory, driven by a virtio driver in the test.

mod disk;
mod hostile;
mod lifecycle;
mod notify;
mod oracle;
mod rig;
mod round_trip;
