//! The commands about guest memory.

use std::fs::File;
use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use super::super::connection::Reply;
use super::super::error::Error;
use super::super::version::MAX_DMA_MAPS;
use super::super::wire::{self, Command};
use super::{Session, malformed, reply, whole};
use crate::addr::{Gpa, Span};
use crate::memory::FileId;
use crate::passthrough::{DmaMap, PassthroughError};

impl Session<'_> {
    pub(super) fn dma_map(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Reply, Error> {
        let command = Command::DmaMap;
        let map = whole::<wire::DmaMap>(command, payload)?;
        let mut fds = fds.into_iter();
        let file = fds.next().map(File::from);
        if fds.next().is_some() {
            return Err(malformed(command, "more than one file descriptor"));
        }
        if map.flags & !(wire::MAP_READ | wire::MAP_WRITE) != 0 || map.flags & wire::MAP_READ == 0 {
            return Err(malformed(command, &format!("flags {:#x}: must be readable, may be writable", map.flags)));
        }
        if self.assignment().maps.len() >= MAX_DMA_MAPS {
            return Err(PassthroughError::TooManyMaps(MAX_DMA_MAPS).into());
        }
        if let Some(file) = &file {
            self.refuse_private(&map, file)?;
            self.link.require_registration()?;
        }
        let wire::DmaMap { flags, offset, address, size, .. } = map;
        let writable = flags & wire::MAP_WRITE != 0;
        self.assignment().maps.map(DmaMap { address, size, offset, writable, file })?;
        Ok(Reply::default())
    }

    /// Refuses a file that the front-end has mapped privately: the guest's writes do not reach the file. A file of which
    /// something is mapped already has been checked.
    fn refuse_private(&mut self, map: &wire::DmaMap, file: &File) -> Result<(), Error> {
        let Some(span) = Span::new(Gpa(map.address), map.size) else { return Ok(()) };
        let id = FileId::of(file, span).map_err(PassthroughError::from)?;
        let private = !self.assignment().maps.has_file(id) && self.peer.maps_privately(id, None);
        if private { Err(PassthroughError::Private(span).into()) } else { Ok(()) }
    }

    pub(super) fn dma_unmap(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        let command = Command::DmaUnmap;
        let unmap = whole::<wire::DmaUnmap>(command, payload)?;
        match unmap.flags {
            0 => self.assignment().maps.unmap(unmap.address, unmap.size)?,
            wire::UNMAP_ALL if unmap.address == 0 && unmap.size == 0 => self.assignment().maps.unmap_everything()?,
            wire::UNMAP_DIRTY_BITMAP => return Err(Error::NotSupported(command as u16)),
            flags => return Err(malformed(command, &format!("flags {flags:#x}, or an address with unmap-all"))),
        }
        Ok(reply([unmap.as_bytes()]))
    }
}
