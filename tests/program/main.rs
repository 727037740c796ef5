//! The program as its user meets it: arguments in; a socket, messages and an exit status out. Each test starts it, with an
//! emulated drive, so nothing here needs hardware or privilege.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod arguments;
mod disk;
mod ending;
mod faults;
mod hostile;
mod process;
mod sockets;
mod vmm;
