//! The helper's side: it answers until the other process has ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::message::{Answer, Reply, Request, What, receive, send};
use crate::addr::Qva;
use crate::vfio::{self, DeviceFile, PciAddress};
use crate::{handover, socket};

/// Answers requests about the function at `address`.
pub(super) fn run(socket: &OwnedFd, address: Option<PciAddress>) {
    // What is no request comes from a bug, and the other process may go on.
    while let Ok(Some((Request { number, what }, fd))) = receive(socket) {
        let (answer, fd) = answer(what, fd, address)
            .unwrap_or_else(|error| (Answer::Failed(error.raw_os_error().unwrap_or(libc::EIO)), None));
        if send(socket, &Reply { number, answer }, fd.as_ref().map(AsFd::as_fd)).is_err() {
            return;
        }
    }
}

fn answer(what: What, fd: Option<OwnedFd>, address: Option<PciAddress>) -> io::Result<(Answer, Option<OwnedFd>)> {
    let open = |file: DeviceFile| {
        let address = address.ok_or(io::Error::from_raw_os_error(libc::ENODEV))?;
        Ok((Answer::Opened, Some(file.open_by_path(address)?)))
    };
    match what {
        What::OpenCdev => open(DeviceFile::Cdev),
        What::OpenGroup => open(DeviceFile::Group),
        What::OpenContainer => open(DeviceFile::Container),
        What::Start => {
            let socket = fd.ok_or(io::Error::from_raw_os_error(libc::EBADF))?;
            let (pid, pidfd) = handover::start_here(socket)?;
            Ok((Answer::Started { pid }, Some(pidfd)))
        }
        What::Maps { pid, file, address } => {
            let privately = socket::maps_privately(pid, file, address.map(Qva));
            Ok((Answer::Maps { privately }, None))
        }
        What::Holder => {
            let asks = std::os::unix::process::parent_id();
            Ok((Answer::Holder { pid: address.and_then(|address| vfio::find_holder(address, &[asks])) }, None))
        }
    }
}
