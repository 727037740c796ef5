//! The driver's side of a virtqueue of a block device: requests in slots (virtio 1.2 §5.2.6), with a split or packed ring.
//!
//! ```text
//! free ── submit, or prepare and offer ──► filled ── publish ──► the device's ── reap / wait ──► free
//! ```

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::packed::Packed;
use super::ram::{Buffer, Ram};
use super::split::Split;
use super::{EVENT_IDX, Error, INDIRECT, PACKED, Shape};

mod session;

const PAGE: usize = 4096;
/// Bytes of a descriptor, and of an indirect table of [`CHAIN`] padded to a power of two.
pub(super) const DESC: usize = 16;
const TABLE: usize = 64;
/// Descriptors of the longest chain.
pub(super) const CHAIN: u16 = 3;
/// Bytes set aside for a header and, at 16, the status.
const HEADER: usize = 64;
const STATUS: usize = 16;

/// A request.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// From the disk to the slot's data.
    Read {
        /// First sector of 512 bytes.
        sector: u64,
        /// Number of bytes.
        bytes: usize,
    },
    /// From the slot's data to the disk.
    Write {
        /// First sector of 512 bytes.
        sector: u64,
        /// Number of bytes.
        bytes: usize,
    },
    /// Makes earlier writes durable.
    Flush,
}

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its slot.
    pub slot: u16,
    /// VIRTIO_BLK_S_OK (0), IOERR (1) or UNSUPP (2); 255 if the device wrote none.
    pub status: u8,
    /// Bytes that the device has written according to the used entry, including the status.
    pub written: u32,
}

/// Offsets of a ring's three areas in the memory.
#[derive(Clone, Copy)]
pub(super) struct Areas {
    pub(super) desc: usize,
    pub(super) driver: usize,
    pub(super) device: usize,
}

/// Offsets of the ring and its requests in the memory.
struct Offsets {
    ring: Areas,
    tables: usize,
    headers: usize,
    data: usize,
    end: usize,
}

impl Offsets {
    fn new(start: usize, ring: [usize; 3], shape: Shape) -> Self {
        let depth = usize::from(shape.depth);
        let pages = |bytes: usize| bytes.next_multiple_of(PAGE);
        let [desc, driver, device] = ring;
        let driver_at = start + pages(desc);
        let device_at = driver_at + pages(driver);
        let tables = device_at + pages(device);
        let headers = tables + pages(depth * TABLE);
        let data = headers + pages(depth * HEADER);
        let ring = Areas { desc: start, driver: driver_at, device: device_at };
        Self { ring, tables, headers, data, end: data + depth * shape.bytes }
    }
}

/// Number of descriptors of the ring, and bytes of its areas.
fn ring_size(shape: Shape, packed: bool) -> (u16, [usize; 3]) {
    let size = if packed { Packed::size(shape.depth) } else { Split::size(shape.depth) };
    (size, if packed { Packed::bytes(size) } else { Split::bytes(size) })
}

/// Bytes of memory for one ring and its requests, with either layout.
pub(super) fn bytes_needed(shape: Shape) -> usize {
    Offsets::new(0, ring_size(shape, false).1, shape).end.max(Offsets::new(0, ring_size(shape, true).1, shape).end)
}

enum Layout {
    Split(Split),
    Packed(Packed),
}

/// Evaluates an expression for either layout.
macro_rules! either {
    ($self:ident, $ring:ident => $call:expr) => {
        match &mut $self.layout {
            Layout::Split($ring) => $call,
            Layout::Packed($ring) => $call,
        }
    };
}

/// One virtqueue.
pub struct Ring {
    ram: Ram,
    offsets: Offsets,
    layout: Layout,
    size: u16,
    bytes: usize,
    shift: usize,
    indirect: bool,
    free: Vec<u16>,
    /// Slots of requests in flight.
    in_flight: Box<[bool]>,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    sleep: Epoll,
    /// Number of kicks.
    pub kicks: u64,
}

impl Ring {
    /// # Panics
    /// If `shape` asks for more than 256 slots, none, or ones that are not whole pages.
    pub(super) fn new(ram: &Ram, index: usize, shape: Shape, features: u64) -> Result<Self, Error> {
        assert!((1..=256).contains(&shape.depth) && shape.bytes.is_multiple_of(PAGE), "{shape:?}");
        let (call, sleep) = (EventFd::new(EFD_NONBLOCK)?, Epoll::new()?);
        sleep.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let (packed, event_idx) = (features & PACKED != 0, features & EVENT_IDX != 0);
        let (size, bytes) = ring_size(shape, packed);
        let offsets = Offsets::new(index * bytes_needed(shape), bytes, shape);
        let layout = if packed {
            Layout::Packed(Packed::new(ram.clone(), offsets.ring, size, event_idx))
        } else {
            Layout::Split(Split::new(ram.clone(), offsets.ring, size, event_idx))
        };
        Ok(Self {
            ram: ram.clone(),
            offsets,
            layout,
            size,
            bytes: shape.bytes,
            shift: shape.shift,
            indirect: features & INDIRECT != 0,
            free: (0..shape.depth).rev().collect(),
            in_flight: vec![false; shape.depth.into()].into(),
            kick: EventFd::new(EFD_NONBLOCK)?,
            call,
            err: EventFd::new(EFD_NONBLOCK)?,
            sleep,
            kicks: 0,
        })
    }

    /// True if another request can be submitted.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// True if nothing is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.in_flight.len()
    }

    /// Allocates a slot and writes its header: a request of type `kind` (virtio 1.2 §5.2.6) at `sector`.
    ///
    /// # Panics
    /// If all slots are in use.
    pub fn prepare(&mut self, kind: u32, sector: u64) -> u16 {
        let slot = self.free.pop().expect("a free slot");
        self.in_flight[usize::from(slot)] = true;
        let header = self.header(slot);
        self.ram.store(header, u64::from(kind));
        self.ram.store(header + 8, sector);
        self.ram.store(header + STATUS, 0xff_u8);
        slot
    }

    #[inline]
    fn header(&self, slot: u16) -> usize {
        self.offsets.headers + usize::from(slot) * HEADER
    }

    #[inline]
    fn data_at(&self, slot: u16) -> usize {
        self.offsets.data + usize::from(slot) * self.bytes + self.shift
    }

    /// The chain of a well-formed request: header, `bytes` of data, status.
    #[inline]
    #[must_use]
    pub fn buffers(&self, slot: u16, bytes: u32, data_flags: u16) -> [Buffer; 3] {
        let header = Ram::guest(self.header(slot));
        [
            Buffer { addr: header, len: 16, flags: 0 },
            Buffer { addr: Ram::guest(self.data_at(slot)), len: bytes, flags: data_flags },
            Buffer { addr: header + STATUS as u64, len: 1, flags: Buffer::WRITABLE },
        ]
    }

    /// Offers a chain of up to three `buffers`, valid or not, as the request of `slot`. Uses an indirect table if that was
    /// negotiated. The device does not see the chain before [`Self::publish`].
    #[inline]
    pub fn offer(&mut self, slot: u16, buffers: &[Buffer]) {
        if !self.indirect {
            return self.offer_linked(slot, buffers);
        }
        let table = self.offsets.tables + usize::from(slot) * TABLE;
        match self.layout {
            Layout::Split(_) => Split::write_table(&self.ram, table, 0, buffers),
            Layout::Packed(_) => Packed::write_table(&self.ram, table, buffers),
        }
        let len = u32::try_from(buffers.len() * DESC).expect("a short table");
        self.offer_linked(slot, &[Buffer { addr: Ram::guest(table), len, flags: Buffer::TABLE }]);
    }

    /// The same without an indirect table.
    #[inline]
    pub fn offer_linked(&mut self, slot: u16, buffers: &[Buffer]) {
        either!(self, ring => ring.offer(slot, buffers));
    }

    /// Fills a slot and offers it.
    ///
    /// # Panics
    /// If all slots are in use, or the request is larger than a slot.
    #[inline]
    pub fn submit(&mut self, request: Request) -> u16 {
        let (kind, sector, bytes, flags) = match request {
            Request::Read { sector, bytes } => (0, sector, bytes, Buffer::WRITABLE),
            Request::Write { sector, bytes } => (1, sector, bytes, 0),
            Request::Flush => (4, 0, 0, 0),
        };
        assert!(bytes <= self.bytes, "{request:?} in slots of {} bytes", self.bytes);
        let slot = self.prepare(kind, sector);
        let [header, data, status] = self.buffers(slot, u32::try_from(bytes).expect("small"), flags);
        if bytes == 0 {
            self.offer(slot, &[header, status]);
        } else {
            self.offer(slot, &[header, data, status]);
        }
        slot
    }

    /// Publishes all offered chains, and kicks the device unless it has suppressed kicks. True if it was kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let wanted = either!(self, ring => ring.publish());
        if wanted {
            self.kicks += 1;
            self.kick.write(1).expect("the server drains the eventfd");
        }
        wanted
    }

    /// Takes one completed request from the ring.
    ///
    /// # Panics
    /// If the device completes a request that is not in flight.
    #[inline]
    pub fn reap(&mut self) -> Option<Completion> {
        self.try_reap().map(|done| done.unwrap_or_else(|slot| panic!("slot {slot} was completed twice")))
    }

    /// The same; an error with the slot (`u16::MAX` for none) if that is not in flight.
    #[inline]
    pub fn try_reap(&mut self) -> Option<Result<Completion, u16>> {
        let (slot, written) = either!(self, ring => ring.take())?;
        if !self.in_flight.get_mut(usize::from(slot)).is_some_and(std::mem::take) {
            return Some(Err(slot));
        }
        self.free.push(slot);
        Some(Ok(Completion { slot, status: self.ram.load(self.header(slot) + STATUS), written }))
    }

    /// Requests a call for the next completion. It may be there already, so reap once more before sleeping on [`Self::call`].
    pub fn expect_call(&mut self) {
        either!(self, ring => ring.request_call(true));
    }

    /// The eventfd that the device signals.
    #[must_use]
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// The eventfd that reports an invalid ring.
    #[must_use]
    pub fn err(&self) -> &EventFd {
        &self.err
    }

    /// Headers, status bytes and data of all slots.
    #[must_use]
    pub fn requests_memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.offsets.end - self.offsets.headers];
        self.ram.read(self.offsets.headers, &mut bytes);
        bytes
    }

    /// Disables calls, for a client that polls.
    #[inline]
    pub fn suppress_calls(&mut self) {
        either!(self, ring => ring.request_call(false));
    }

    /// Sleeps until a request completes; `None` if none does within `limit`.
    ///
    /// # Errors
    /// Those of `epoll_wait`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Completion>, Error> {
        let start = Instant::now();
        loop {
            either!(self, ring => ring.request_call(true));
            if let Some(done) = self.reap() {
                return Ok(Some(done));
            }
            let Some(rest) = limit.checked_sub(start.elapsed()) else { return Ok(None) };
            // Rounded up, because 0 ms would not wait.
            let milliseconds = i32::try_from(rest.as_millis() + 1).unwrap_or(i32::MAX);
            match self.sleep.wait(milliseconds, &mut [EpollEvent::default()]) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
                // After a time-out the eventfd is empty.
                _ => drop(self.call.read()),
            }
        }
    }

    /// Makes the ring invalid, kicks, and waits until the device reports the error; false if it does not. Nothing may be in
    /// flight, and the ring cannot be used afterwards.
    ///
    /// # Errors
    /// Those of `epoll_wait`.
    pub fn corrupt_ring(&mut self, limit: Duration) -> Result<bool, Error> {
        either!(self, ring => ring.corrupt_ring());
        either!(self, ring => ring.publish());
        self.kick.write(1)?;
        let reported = Epoll::new()?;
        reported.ctl(ControlOperation::Add, self.err.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let milliseconds = i32::try_from(limit.as_millis())?;
        Ok(reported.wait(milliseconds, &mut [EpollEvent::default()])? == 1)
    }

    /// Fills a slot's data. Call it between submit and publish.
    ///
    /// # Panics
    /// If `bytes` is larger than a slot.
    pub fn set_data(&self, slot: u16, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes in slots of {}", bytes.len(), self.bytes);
        self.ram.write(self.data_at(slot), bytes);
    }

    /// Copies a slot's data to `bytes`.
    ///
    /// # Panics
    /// If `bytes` is larger than a slot.
    pub fn data(&self, slot: u16, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes in slots of {}", bytes.len(), self.bytes);
        self.ram.read(self.data_at(slot), bytes);
    }
}
