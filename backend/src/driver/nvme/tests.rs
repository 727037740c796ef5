//! The driver on the emulated function, through the same traits as on VFIO.

mod cache_maintenance;
mod command_faults;
mod command_sets;
mod controller_faults;
mod hand_over;
mod interrupts;
mod io;
mod lifecycle;
pub(super) mod rig;
mod several_namespaces;
mod traits;
