//! The messages about requests in flight.

use std::fs::File;

use vhost::vhost_user::message::VhostUserInflight;

use super::super::Error;
use super::super::inflight::Request;
use super::Session;
use super::descriptor::set_cloexec;

impl Session<'_> {
    fn inflight_request(&self, name: &'static str) -> Request {
        Request { name, queues: self.device.queues, layout: self.layout() }
    }

    /// GET_INFLIGHT_FD: new regions. They are used once the front-end sends them back.
    pub(super) fn make_inflight(&self, message: &VhostUserInflight) -> Result<(VhostUserInflight, File), Error> {
        self.inflight_request("GET_INFLIGHT_FD").make(message)
    }

    /// SET_INFLIGHT_FD: the rings that start from now on use these regions. QEMU sends them before each start of the device.
    pub(super) fn accept_inflight(&mut self, message: &VhostUserInflight, file: File) -> Result<(), Error> {
        let file = set_cloexec(file)?;
        let regions = self.inflight_request("SET_INFLIGHT_FD").map(message, file, &self.logs.memory)?;
        self.inflight = Some(regions);
        Ok(())
    }
}
