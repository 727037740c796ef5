//! The driver above the emulated function: the same trait objects that it meets above VFIO.

mod caches;
mod faults;
mod hostile;
mod io;
mod life;
pub(super) mod rig;
