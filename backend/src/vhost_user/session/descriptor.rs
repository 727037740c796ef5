//! The descriptors of a message.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::io::{FdFlags, fcntl_setfd};

use super::super::Error;
use crate::foreign_fd::{Kind, name};

/// The codec receives descriptors without close-on-exec.
pub(super) fn set_cloexec(file: File) -> Result<File, Error> {
    fcntl_setfd(&file, FdFlags::CLOEXEC).map_err(Error::system("set close-on-exec"))?;
    Ok(file)
}

/// A virtqueue's kick, call or error descriptor.
pub(super) fn event_fd(file: Option<File>) -> Result<Option<OwnedFd>, Error> {
    let Some(file) = file else { return Ok(None) };
    let fd = OwnedFd::from(set_cloexec(file)?);
    if Kind::of(&fd) == Kind::Event { Ok(Some(fd)) } else { Err(Error::NotAnEventfd(name(&fd))) }
}
