//! The virtual machine goes on in another process, as after a migration on one host: another front-end connects to the same server
//! while the first is still served, and takes its place.

use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

use super::super::ram::Ram;
use super::{ANSWER_LIMIT, Error, Guest, Region, negotiate};

/// What the next process has for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextMemory {
    /// Files of its own, to which all is copied when the first process has stopped.
    Copied,
    /// The files of the first process, as with QEMU's `x-ignore-shared` or `cpr-transfer`.
    Same,
}

/// The front-end in the next process, before it has its turn.
pub struct NextFrontEnd {
    frontend: Frontend,
    socket: UnixStream,
    ram: Ram,
    features: u64,
    shared: bool,
}

impl Guest {
    /// Connects the next front-end, which negotiates. It shares its memory now if `early`, else when it starts, as QEMU does.
    ///
    /// # Errors
    /// What the server refused.
    pub fn prepare_next(&self, socket: UnixStream, memory: NextMemory, early: bool) -> Result<NextFrontEnd, Error> {
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut frontend = Frontend::from_stream(socket.try_clone()?, self.shape.queues as u64);
        frontend.set_owner()?;
        let features = negotiate(&mut frontend, self.shape, self.protocol_features())?;
        let ram = if memory == NextMemory::Same { self.ram.clone() } else { Ram::new(self.ram.size())? };
        if early {
            frontend.set_mem_table(&[ram.region()])?;
        }
        Ok(NextFrontEnd { frontend, socket, ram, features, shared: early })
    }

    /// Describes the rings to the server of `next`, and enables them, while this front-end's still run.
    ///
    /// # Errors
    /// What the server refused.
    pub fn start_too_early(&self, next: &mut NextFrontEnd) -> Result<(), Error> {
        self.start_next(next, &vec![0; self.rings.len()])
    }

    fn start_next(&self, next: &mut NextFrontEnd, bases: &[u32]) -> Result<(), Error> {
        for (index, ring) in self.rings.iter().enumerate() {
            ring.describe(&next.frontend, index)?;
            super::send_base(&next.socket, index, bases[index])?;
            ring.run(&mut next.frontend, index)?;
        }
        Ok(())
    }

    /// The first process stops its rings and hands its positions over; the next one goes on. The first stays connected until then.
    ///
    /// # Errors
    /// What the server refused.
    pub fn change_to(&mut self, mut next: NextFrontEnd) -> Result<(), Error> {
        let bases = {
            let (frontend, _) = self.link.as_ref().ok_or("not connected")?;
            let stop = |index| Ok::<_, Error>(frontend.get_vring_base(index)?);
            (0..self.rings.len()).map(stop).collect::<Result<Vec<_>, _>>()?
        };
        self.copy_memory(&next);
        let first = self.link.take();
        if self.policy == Region::Kept {
            self.inflight = None;
            self.hand_in(&mut next.frontend)?;
        }
        next.frontend.set_features(next.features)?;
        if !next.shared {
            next.frontend.set_mem_table(&[self.ram.region()])?;
        }
        self.start_next(&mut next, &bases)?;
        let NextFrontEnd { frontend, socket, features, .. } = next;
        self.features = features;
        self.watch(&socket)?;
        self.link = Some((frontend, socket));
        drop(first);
        Ok(())
    }

    fn copy_memory(&mut self, next: &NextFrontEnd) {
        if next.ram.address(0) == self.ram.address(0) {
            return;
        }
        let mut bytes = vec![0; self.ram.size()];
        self.ram.read(0, &mut bytes);
        next.ram.write(0, &bytes);
        self.ram = next.ram.clone();
        self.rings.iter_mut().for_each(|ring| ring.move_to(&next.ram));
    }
}
