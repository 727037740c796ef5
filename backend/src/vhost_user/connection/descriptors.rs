//! Messages that carry one descriptor and nothing else, which the codec cannot handle.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage};

use super::{Connection, Header};
use crate::vhost_user::Error;
use crate::vhost_user::features::ProtocolFeatures;

impl Connection<'_> {
    pub(super) fn set_backend_channel(&mut self, header: Header) -> Result<(), Error> {
        self.require_feature(header, ProtocolFeatures::BACKEND_REQ)?;
        let socket = self.receive_descriptor(header)?;
        let result = self.session().set_channel(socket);
        self.acknowledge(header, result)
    }

    pub(super) fn set_log_event(&mut self, header: Header) -> Result<(), Error> {
        self.require_feature(header, ProtocolFeatures::LOG_SHMFD)?;
        let event = self.receive_descriptor(header)?;
        let result = self.session().set_log_event(event);
        self.acknowledge(header, result)
    }

    fn receive_descriptor(&self, header: Header) -> Result<OwnedFd, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let [] = self.receive(header, &mut control)?;
        // Control messages are padded, so two descriptors may fit.
        let mut received: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                received.extend(fds);
            }
        }
        let problem = "exactly one file descriptor is required";
        match (received.pop(), received.is_empty()) {
            (Some(descriptor), true) => Ok(descriptor),
            _ => Err(Error::Descriptors { request: header.name(), problem }),
        }
    }
}
