//! A session that stops in one process and goes on in another, or in this one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserMemoryRegion};

use super::Session;
use crate::addr::Address;
use crate::engine::Layout;
use crate::handover::{FrontEnd, Incoming, InflightState, LogState, Outgoing, RegionState};
use crate::memory::RegionSpec;
use crate::vhost_user::Error;
use crate::vhost_user::inflight::InflightRegions;

impl Session<'_> {
    /// Stops every running vring. [`Self::resume`] lets them go on where they stopped.
    pub(in super::super) fn pause(&mut self) -> Result<(), Error> {
        let engine = &self.device.engine;
        self.rings.iter_mut().map(|ring| ring.pause(engine)).fold(Ok(()), Result::and)
    }

    /// Starts every vring that can run.
    pub(in super::super) fn resume(&mut self) {
        self.start_rings();
        self.monitor_discards();
    }

    /// Unmaps all memory, and keeps the registration with the shim.
    pub(in super::super) fn release_memory(&mut self) -> Result<(), Error> {
        self.memory.release()
    }

    /// Describes the session. Its vrings do not run, and no message has been read and not answered.
    pub(in super::super) fn describe(&self, connection: impl AsFd, outgoing: &mut Outgoing) -> io::Result<FrontEnd> {
        let connection = outgoing.push(connection)?;
        let channel = outgoing.push_some(self.channel.as_ref())?;
        let (mut sources, mut files, mut regions) = (Vec::new(), Vec::new(), Vec::new());
        for region in self.memory.table().regions() {
            let source: *const std::fs::File = region.file();
            let known = sources.iter().position(|known| *known == source);
            let file = known.map_or_else(
                || -> io::Result<usize> {
                    sources.push(source);
                    files.push(outgoing.push(region.file())?);
                    Ok(files.len() - 1)
                },
                Ok,
            )?;
            regions.push(RegionState {
                gpa: region.gpa().start().raw(),
                size: region.qva().len(),
                user: region.qva().start().raw(),
                offset: region.offset(),
                file,
                inode: region.id().inode(),
            });
        }
        Ok(FrontEnd {
            connection,
            asked_features: self.negotiation.0,
            acked_features: self.negotiation.1,
            negotiated: self.features.is_some(),
            protocol_features: self.protocol.bits(),
            status: self.status,
            refusals: self.refusals,
            channel,
            files,
            regions,
            inflight: self.inflight.as_ref().map(|regions| describe_inflight(regions, outgoing)).transpose()?,
            log: self.log.describe(outgoing)?,
            log_event: outgoing.push_some(self.log.event.as_deref())?,
            rings: self.rings.iter().map(|ring| ring.describe(outgoing)).collect::<io::Result<_>>()?,
            shim: self.shim.describe(outgoing)?,
        })
    }

    /// Restores what follows the negotiation, as if the front-end had sent the messages. No vring starts.
    ///
    /// # Errors
    /// As for these messages, or the description contradicts itself.
    pub(in super::super) fn restore(&mut self, state: &FrontEnd, descriptors: &mut Incoming) -> Result<(), Error> {
        if !state.negotiated {
            self.features = None;
        }
        (self.status, self.refusals, self.features_logged) = (state.status, state.refusals, true);
        self.shim.restore(state.shim.as_ref(), descriptors)?;
        if let Some(channel) = descriptors.take_some(state.channel)? {
            self.set_channel(channel)?;
        }
        self.restore_memory(state, descriptors)?;
        if let Some(inflight) = &state.inflight {
            let InflightState { size: mmap_size, offset: mmap_offset, queues: num_queues, entries: queue_size, .. } =
                *inflight;
            let message = VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size };
            self.accept_inflight(&message, descriptors.take(inflight.file)?.into())?;
        }
        let found = state.rings.len();
        if found != self.rings.len() {
            return Err(Error::RingCount { found, queues: self.device.queues });
        }
        let layout = self.layout();
        for (ring, state) in self.rings.iter_mut().zip(&state.rings) {
            ring.restore(state, descriptors, layout)?;
        }
        // After what it must have room for.
        if let Some(event) = descriptors.take_some(state.log_event)? {
            self.set_log_event(event)?;
        }
        if let Some(LogState { file, size: mmap_size, offset: mmap_offset }) = state.log {
            self.adopt_log(&VhostUserLog { mmap_size, mmap_offset }, descriptors.take(file)?.into())?;
        }
        Ok(())
    }

    /// The process before has crashed while the rings ran: a split ring goes on at its used index, from where the inflight region
    /// says what was in flight. For a packed ring the region says everything.
    pub(in super::super) fn rebase_after_crash(&mut self) {
        let (layout, table) = (self.layout(), self.memory.table());
        if layout == Some(Layout::Split) {
            self.rings.iter_mut().for_each(|ring| ring.rebase(table));
        }
    }

    fn restore_memory(&mut self, state: &FrontEnd, descriptors: &mut Incoming) -> Result<(), Error> {
        if state.regions.is_empty() {
            return Ok(());
        }
        self.shim.require_registration()?;
        let files = state.files.iter().map(|number| descriptors.take(*number));
        let files = files.collect::<Result<Vec<OwnedFd>, _>>()?;
        let mut specs: Vec<RegionSpec> = Vec::new();
        for region in &state.regions {
            let file = files.get(region.file).ok_or(Error::NoSuchFile(region.file))?;
            let file = file.try_clone().map_err(Error::system("duplicate a memory file"))?.into();
            let message = VhostUserMemoryRegion {
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                user_addr: region.user,
                mmap_offset: region.offset,
            };
            let mut spec = self.spec(&message, file)?;
            // One descriptor for each file, as before.
            let first = state.regions.iter().position(|other| other.file == region.file);
            if let Some(earlier) = first.and_then(|first| specs.get(first)) {
                spec.file = Arc::clone(&earlier.file);
            }
            specs.push(spec);
        }
        self.memory.inherit(specs, state.regions.iter().map(|region| region.inode))
    }
}

fn describe_inflight(regions: &InflightRegions<'_>, outgoing: &mut Outgoing) -> io::Result<InflightState> {
    let (file, message) = regions.announced();
    let VhostUserInflight { mmap_size: size, mmap_offset: offset, num_queues: queues, queue_size: entries } = message;
    Ok(InflightState { file: outgoing.push(file)?, size, offset, queues, entries })
}
