//! The descriptors of a message.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::io::{FdFlags, fcntl_setfd};

use super::super::Error;
use crate::foreign_fd::check_eventfd;

/// The codec receives descriptors without close-on-exec.
pub(super) fn set_cloexec(file: File) -> Result<File, Error> {
    fcntl_setfd(&file, FdFlags::CLOEXEC).map_err(Error::system("set close-on-exec"))?;
    Ok(file)
}

/// The descriptor of `request`: the kick, call or error descriptor of a virtqueue.
pub(in super::super) fn event_fd(request: &'static str, file: Option<File>) -> Result<Option<OwnedFd>, Error> {
    let Some(file) = file else { return Ok(None) };
    check_eventfd(&file).map_err(|source| Error::NotAnEventfd { request, source })?;
    set_cloexec(file).map(OwnedFd::from).map(Some)
}
