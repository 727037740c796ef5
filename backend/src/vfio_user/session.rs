//! One front-end's session: executes its commands. [`Session::handle`] calls one function for each command and replies with its
//! result, so a command is acknowledged only after it is done, and a failed command changes nothing.

mod memory;

use std::os::fd::{BorrowedFd, OwnedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::assignment::assign;
use super::connection::{Message, Reply};
use super::counters::Counters;
use super::error::Error;
use super::version::{self, Limits, MAX_TEXT};
use super::wire::{self, Command, Header, NO_REPLY};
use crate::coherency::Verdict;
use crate::kvm::{ShimLink, Vmm};
use crate::memory::HostPage;
use crate::passthrough::{Assignment, Passthrough};
use crate::rate_limited_log::SharedLog;
use crate::socket::Peer;
use crate::whole_function::{CONFIG_REGION, IRQS, IrqAction, IrqData, IrqSet, REGIONS};

/// Attempts to assign the function, in one conversation. QEMU makes one.
const MAX_FAILED_ASSIGNMENTS: u32 = 4;

/// The response to a command.
pub(super) enum Response {
    /// A reply, or an errno, to the command with this header.
    Reply(Header, Result<Reply, u32>),
    /// None: the client has set `NO_REPLY`.
    None,
}

/// See the top of this file.
pub(super) struct Session<'d> {
    device: &'d Passthrough,
    peer: Peer,
    /// `None` until the `VERSION` command has succeeded. Before `link`, so that it is dropped first: memory is unmapped while
    /// the function is still registered with the shim.
    negotiated: Option<Negotiated<'d>>,
    link: ShimLink<'d>,
    /// Readable when the server must stop.
    stop: BorrowedFd<'d>,
    refusals: &'d SharedLog,
    /// Attempts to assign the function that have failed.
    failed_assignments: u32,
    counters: Counters,
}

/// What a session has after the `VERSION` command.
struct Negotiated<'d> {
    limits: Limits,
    assignment: Assignment<'d>,
}

impl<'d> Session<'d> {
    pub(super) fn new(
        device: &'d Passthrough,
        vmm: &'d Vmm,
        refusals: &'d SharedLog,
        peer: Peer,
        stop: BorrowedFd<'d>,
    ) -> Self {
        let (link, counters) = (ShimLink::new(vmm, peer.pid()), Counters::default());
        Self { device, peer, negotiated: None, link, stop, refusals, failed_assignments: 0, counters }
    }

    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// True after a `VERSION` command that has succeeded.
    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated.is_some()
    }

    /// The connection to the shim in the client's process.
    pub(super) fn link(&mut self) -> &mut ShimLink<'d> {
        &mut self.link
    }

    /// Asks the virtual machine to unplug the function; false if it has set no eventfd for that.
    pub(super) fn request_unplug(&self) -> bool {
        self.negotiated.as_ref().is_some_and(|negotiated| negotiated.assignment.interrupts.request_unplug())
    }

    /// Ends the assignment, then unregisters the function.
    pub(super) fn close(mut self) {
        drop(self.negotiated);
        self.link.unregister();
    }

    /// Executes a command.
    ///
    /// # Errors
    /// Why the connection must be closed, after the response has been sent.
    pub(super) fn handle(&mut self, message: Message) -> (Response, Result<(), Error>) {
        self.counters.messages += 1;
        let header = message.header;
        let no_reply = header.flags & NO_REPLY != 0 && self.negotiated.is_some();
        let result = self.dispatch(message);
        let (reply, outcome) = match result {
            Ok(reply) => (Ok(reply), Ok(())),
            Err(error) => {
                let errno = error.errno();
                self.counters.refused += 1;
                let fatal = error.is_fatal();
                if !fatal {
                    self.refusals.error(|| format!("refused: {error}"));
                }
                (Err(errno), if fatal { Err(error) } else { Ok(()) })
            }
        };
        (if no_reply { Response::None } else { Response::Reply(header, reply) }, outcome)
    }

    fn dispatch(&mut self, message: Message) -> Result<Reply, Error> {
        let Message { header, payload, fds, unusable } = message;
        let command = Command::from_raw(header.command).ok_or(Error::NotSupported(header.command))?;
        if self.negotiated.is_none() != (command == Command::Version) {
            return Err(match command {
                Command::Version => malformed(command, "already negotiated"),
                _ => Error::TooEarly(name(command)),
            });
        }
        if !fds.is_empty() && !matches!(command, Command::DmaMap | Command::DeviceSetIrqs) {
            return Err(malformed(command, "it carries file descriptors"));
        }
        if let Some(unusable) = unusable {
            return Err(Error::Descriptors { command: name(command), unusable });
        }
        match command {
            Command::Version => self.version(&payload),
            Command::DmaMap => self.dma_map(&payload, fds),
            Command::DmaUnmap => self.dma_unmap(&payload),
            Command::DeviceGetInfo => self.device_info(&payload),
            Command::DeviceGetRegionInfo => self.region_info(&payload),
            Command::DeviceGetIrqInfo => self.irq_info(&payload),
            Command::DeviceSetIrqs => self.set_irqs(&payload, fds),
            Command::RegionRead => self.region_read(&payload),
            Command::RegionWrite => self.region_write(&payload),
            Command::DeviceReset => self.reset(&payload),
        }
    }

    /// Negotiates the version and assigns the function to the client. The client may map memory afterwards, so this connects to
    /// the shim in its process and checks the verdict.
    fn version(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        let (version, text) = prefix::<wire::Version>(Command::Version, payload)?;
        if version.major != version::MAJOR {
            return Err(Error::Version(version.major, version.minor));
        }
        if text.len() > MAX_TEXT {
            return Err(Error::Capabilities(format!("{} bytes of text; must be at most {MAX_TEXT}", text.len())));
        }
        let (limits, text) = version::negotiate(text, HostPage::of_system())?;
        self.link.register();
        if let Verdict::Refuse(refusal) = self.device.verdict(self.link.blocks_discards()) {
            return Err(Error::Refused(self.device.name().to_owned(), refusal));
        }
        let version = wire::Version { major: version::MAJOR, minor: version.minor.min(version::MINOR) };
        self.negotiated = Some(Negotiated { limits, assignment: self.assign()? });
        Ok(reply([version.as_bytes(), &text]))
    }

    /// Each attempt resets the function, and its failure costs a line. So after a few of them the front-end must go.
    fn assign(&mut self) -> Result<Assignment<'d>, Error> {
        assign(self.device, self.stop).map_err(|error| {
            self.failed_assignments += 1;
            if self.failed_assignments < MAX_FAILED_ASSIGNMENTS { error.into() } else { Error::Unassignable(error) }
        })
    }

    /// The assigned function. Only for commands other than `VERSION`.
    fn assignment(&mut self) -> &mut Assignment<'d> {
        &mut self.negotiated.as_mut().expect("`dispatch` refuses other commands before VERSION").assignment
    }

    fn device_info(&self, payload: &[u8]) -> Result<Reply, Error> {
        whole::<wire::DeviceInfo>(Command::DeviceGetInfo, payload)?;
        let flags = wire::DEVICE_PCI | if self.device.resettable() { wire::DEVICE_RESET } else { 0 };
        Ok(reply([wire::DeviceInfo { argsz: 16, flags, num_regions: REGIONS, num_irqs: IRQS }.as_bytes()]))
    }

    fn region_info(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        let command = Command::DeviceGetRegionInfo;
        let request = whole::<wire::RegionInfo>(command, payload)?;
        if (request.argsz as usize) < size_of::<wire::RegionInfo>() || request.index >= REGIONS {
            return Err(malformed(command, &format!("region {} with room for {} bytes", request.index, request.argsz)));
        }
        let info = self.assignment().regions.info(request.index);
        let mut flags = if info.readable { wire::REGION_READ } else { 0 };
        flags |= if info.writable { wire::REGION_WRITE } else { 0 };
        // A client that accepts no descriptors accesses the region by messages.
        let mappable = info.size != 0 && self.negotiated.as_ref().is_some_and(|agreed| agreed.limits.client_fds != 0);
        let mmap = if mappable { self.assignment().regions.mmap(request.index)? } else { None };
        let mut fixed =
            wire::RegionInfo { argsz: 32, flags, index: request.index, cap_offset: 0, size: info.size, offset: 0 };
        let Some(mmap) = mmap else { return Ok(reply([fixed.as_bytes()])) };
        if mmap.own_file {
            self.device.note_given_to(self.peer.pid());
        }
        fixed.flags |= wire::REGION_MMAP;
        fixed.offset = mmap.offset;
        let mut areas = Vec::new();
        if !mmap.areas.is_empty() {
            fixed.flags |= wire::REGION_CAPS;
            let count = u32::try_from(mmap.areas.len()).expect("a few areas");
            areas.extend_from_slice(wire::SparseMmap::new(count).as_bytes());
            for area in &mmap.areas {
                areas.extend_from_slice(wire::SparseArea { offset: area.offset, size: area.size }.as_bytes());
            }
            fixed.argsz += u32::try_from(areas.len()).expect("a few areas");
        }
        // A client without room for the capabilities repeats the command with the `argsz` of this reply.
        if fixed.argsz <= request.argsz && !areas.is_empty() {
            fixed.cap_offset = 32;
        } else {
            areas.clear();
        }
        Ok(Reply { fds: vec![mmap.file], ..reply([fixed.as_bytes(), &areas]) })
    }

    fn irq_info(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        let command = Command::DeviceGetIrqInfo;
        let request = whole::<wire::IrqInfo>(command, payload)?;
        if request.index >= IRQS {
            return Err(malformed(command, &format!("interrupt {}: there are {IRQS}", request.index)));
        }
        let irq = self.assignment().interrupts.info(request.index);
        let info = wire::IrqInfo { argsz: 16, flags: irq.flags, index: request.index, count: irq.count };
        Ok(reply([info.as_bytes()]))
    }

    fn set_irqs(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Reply, Error> {
        let command = Command::DeviceSetIrqs;
        let (set, bytes) = prefix::<wire::SetIrqs>(command, payload)?;
        let wire::SetIrqs { flags, index, start, count, .. } = set;
        let data = flags & (wire::IRQ_DATA_NONE | wire::IRQ_DATA_BOOL | wire::IRQ_DATA_EVENTFD);
        let action = match flags & !data {
            wire::IRQ_MASK => IrqAction::Mask,
            wire::IRQ_UNMASK => IrqAction::Unmask,
            wire::IRQ_TRIGGER => IrqAction::Trigger,
            _ => return Err(malformed(command, &format!("flags {flags:#x}"))),
        };
        let all_or_none = fds.is_empty() || fds.len() == count as usize;
        let data = match data {
            wire::IRQ_DATA_NONE if bytes.is_empty() && fds.is_empty() => IrqData::None,
            wire::IRQ_DATA_BOOL if bytes.len() == count as usize && fds.is_empty() => IrqData::Bools(bytes),
            wire::IRQ_DATA_EVENTFD if bytes.is_empty() && all_or_none => IrqData::Eventfds(&[]),
            _ => {
                let (bytes, fds) = (bytes.len(), fds.len());
                let defect =
                    format!("flags {flags:#x} do not match {count} vectors, {bytes} bytes and {fds} descriptors");
                return Err(malformed(command, &defect));
            }
        };
        self.assignment().interrupts.set(&IrqSet { index, start, count, action, data }, fds)?;
        Ok(Reply::default())
    }

    fn region_read(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        let access = whole::<wire::RegionAccess>(Command::RegionRead, payload)?;
        let count = self.transfer(Command::RegionRead, access)?;
        let mut bytes = vec![0; count];
        self.assignment().regions.check(access.region, access.offset, count)?;
        if access.region == CONFIG_REGION {
            self.counters.config_accesses += 1;
            self.assignment().config.read(config_offset(access), &mut bytes)?;
        } else {
            self.counters.region_reads += 1;
            self.assignment().regions.read(access.region, access.offset, &mut bytes)?;
        }
        Ok(reply([access.as_bytes(), &bytes]))
    }

    fn region_write(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        let command = Command::RegionWrite;
        let (access, bytes) = prefix::<wire::RegionAccess>(command, payload)?;
        let count = self.transfer(command, access)?;
        if bytes.len() != count {
            return Err(malformed(command, &format!("{} bytes of data; the count is {count}", bytes.len())));
        }
        self.assignment().regions.check(access.region, access.offset, count)?;
        if access.region == CONFIG_REGION {
            self.counters.config_accesses += 1;
            self.assignment().config.write(config_offset(access), &mut bytes.to_vec())?;
        } else {
            self.counters.region_writes += 1;
            self.assignment().regions.write(access.region, access.offset, bytes)?;
        }
        Ok(reply([access.as_bytes()]))
    }

    /// The byte count of an access, checked against the negotiated limit.
    fn transfer(&self, command: Command, access: wire::RegionAccess) -> Result<usize, Error> {
        let max = self.negotiated.as_ref().map_or(0, |negotiated| negotiated.limits.transfer);
        let count = access.count as usize;
        if access.region >= REGIONS || count > max {
            let region = access.region;
            let defect = format!("{count} bytes of region {region}: at most {max} bytes, of {REGIONS} regions");
            return Err(malformed(command, &defect));
        }
        Ok(count)
    }

    fn reset(&mut self, payload: &[u8]) -> Result<Reply, Error> {
        if !payload.is_empty() {
            return Err(malformed(Command::DeviceReset, "it carries data"));
        }
        self.counters.resets += 1;
        self.assignment().reset()?;
        Ok(Reply::default())
    }
}

/// The offset, which has been checked against the size of configuration space (at most 4096 bytes).
fn config_offset(access: wire::RegionAccess) -> u16 {
    u16::try_from(access.offset).expect("checked against the region")
}

fn reply<const N: usize>(parts: [&[u8]; N]) -> Reply {
    Reply { payload: parts.concat(), fds: Vec::new() }
}

/// Reads a payload that is exactly a `T`.
fn whole<T: FromBytes>(command: Command, payload: &[u8]) -> Result<T, Error> {
    let error = || malformed(command, &format!("{} bytes of payload; must be {}", payload.len(), size_of::<T>()));
    T::read_from_bytes(payload).map_err(|_| error())
}

/// Reads a payload that starts with a `T`; returns the rest of it as well.
fn prefix<T: FromBytes>(command: Command, payload: &[u8]) -> Result<(T, &[u8]), Error> {
    let error =
        || malformed(command, &format!("{} bytes of payload; must be at least {}", payload.len(), size_of::<T>()));
    T::read_from_prefix(payload).map_err(|_| error())
}

fn malformed(command: Command, defect: &str) -> Error {
    Error::Malformed { command: name(command), defect: defect.to_owned() }
}

fn name(command: Command) -> &'static str {
    match command {
        Command::Version => "VERSION",
        Command::DmaMap => "DMA_MAP",
        Command::DmaUnmap => "DMA_UNMAP",
        Command::DeviceGetInfo => "DEVICE_GET_INFO",
        Command::DeviceGetRegionInfo => "DEVICE_GET_REGION_INFO",
        Command::DeviceGetIrqInfo => "DEVICE_GET_IRQ_INFO",
        Command::DeviceSetIrqs => "DEVICE_SET_IRQS",
        Command::RegionRead => "REGION_READ",
        Command::RegionWrite => "REGION_WRITE",
        Command::DeviceReset => "DEVICE_RESET",
    }
}
