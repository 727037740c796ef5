//! Tests of the program as a process: arguments in; a socket, messages and an exit status out. Each test starts it with an
//! emulated drive, so no hardware or privilege is needed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod arguments;
mod dirty_pages;
mod disk;
mod ending;
mod faults;
mod fresh_guests;
mod hand_over;
mod hostile;
mod kills;
mod limits;
mod log_lines;
mod operator;
mod placement;
mod process;
mod sandbox;
mod service_manager;
mod several;
mod sockets;
mod succession;
mod vmm;
mod whole;
