//! A virtqueue of a block device as the guest's driver sees it: requests in slots (virtio 1.2 §5.2.6), whichever way the
//! ring itself is laid out.
//!
//! ```text
//! free ── submit, or prepare and offer ──► filled ── publish ──► the device's ── reap / wait ──► free
//! ```

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::packed::Packed;
use super::ram::{Part, Ram};
use super::split::Split;
use super::{EVENT_IDX, Error, INDIRECT, PACKED, Shape};

const PAGE: usize = 4096;
/// Bytes of a descriptor, and of an indirect table of [`CHAIN`] padded to a power of two.
pub(super) const DESC: usize = 16;
const TABLE: usize = 64;
/// Descriptors of the longest chain.
pub(super) const CHAIN: u16 = 3;
/// Bytes set aside for a header and, at 16, the status.
const HEADER: usize = 64;
const STATUS: usize = 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// From the disk to the slot's data.
    Read {
        /// Where, sectors of 512 bytes.
        sector: u64,
        /// How much.
        bytes: usize,
    },
    /// From the slot's data to the disk.
    Write {
        /// Where, sectors of 512 bytes.
        sector: u64,
        /// How much.
        bytes: usize,
    },
    /// What has been written becomes durable.
    Flush,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which.
    pub slot: u16,
    /// VIRTIO_BLK_S_OK (0), IOERR (1) or UNSUPP (2); 255 if the device wrote none.
    pub status: u8,
    /// How many bytes the device says it has written, the status among them.
    pub written: u32,
}

/// Where the three areas of a ring lie, offsets into the memory.
#[derive(Clone, Copy)]
pub(super) struct Areas {
    pub(super) desc: usize,
    pub(super) driver: usize,
    pub(super) device: usize,
}

/// Where the parts lie, offsets into the memory.
struct Places {
    ring: Areas,
    tables: usize,
    headers: usize,
    data: usize,
    end: usize,
}

impl Places {
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

/// Descriptors of the ring, and bytes of its areas.
fn ring_size(shape: Shape, packed: bool) -> (u16, [usize; 3]) {
    let size = if packed { Packed::size(shape.depth) } else { Split::size(shape.depth) };
    (size, if packed { Packed::bytes(size) } else { Split::bytes(size) })
}

/// Bytes of memory for one ring and its requests, whichever its layout.
pub(super) fn bytes_needed(shape: Shape) -> usize {
    Places::new(0, ring_size(shape, false).1, shape).end.max(Places::new(0, ring_size(shape, true).1, shape).end)
}

enum Layout {
    Split(Split),
    Packed(Packed),
}

/// One line for both layouts.
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
    places: Places,
    layout: Layout,
    size: u16,
    bytes: usize,
    indirect: bool,
    free: Vec<u16>,
    /// Which slots the device has.
    away: Box<[bool]>,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    sleep: Epoll,
    /// How often the device has been kicked.
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
        let places = Places::new(index * bytes_needed(shape), bytes, shape);
        let layout = if packed {
            Layout::Packed(Packed::new(ram.clone(), places.ring, size, event_idx))
        } else {
            Layout::Split(Split::new(ram.clone(), places.ring, size, event_idx))
        };
        Ok(Self {
            ram: ram.clone(),
            places,
            layout,
            size,
            bytes: shape.bytes,
            indirect: features & INDIRECT != 0,
            free: (0..shape.depth).rev().collect(),
            away: vec![false; shape.depth.into()].into(),
            kick: EventFd::new(EFD_NONBLOCK)?,
            call,
            err: EventFd::new(EFD_NONBLOCK)?,
            sleep,
            kicks: 0,
        })
    }

    /// Sets the ring up on the server's side and enables it.
    pub(super) fn start(&self, frontend: &mut Frontend, index: usize) -> Result<(), Error> {
        frontend.set_vring_num(index, self.size)?;
        frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: self.size,
                queue_size: self.size,
                flags: 0,
                desc_table_addr: self.ram.address(self.places.ring.desc),
                used_ring_addr: self.ram.address(self.places.ring.device),
                avail_ring_addr: self.ram.address(self.places.ring.driver),
                log_addr: None,
            },
        )?;
        // A packed ring begins with both wrap counters 1; as DPDK does, only the available one is said.
        frontend.set_vring_base(index, if matches!(self.layout, Layout::Packed(_)) { 0x8000 } else { 0 })?;
        frontend.set_vring_call(index, &self.call)?;
        frontend.set_vring_err(index, &self.err)?;
        frontend.set_vring_kick(index, &self.kick)?;
        frontend.set_vring_enable(index, true)?;
        Ok(())
    }

    /// True if another request can be submitted.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// True if nothing is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.away.len()
    }

    /// Takes a slot and writes its header: a request of type `kind` (virtio 1.2 §5.2.6) at `sector`.
    ///
    /// # Panics
    /// If all slots are taken.
    pub fn prepare(&mut self, kind: u32, sector: u64) -> u16 {
        let slot = self.free.pop().expect("a free slot");
        self.away[usize::from(slot)] = true;
        let header = self.header(slot);
        self.ram.store(header, u64::from(kind));
        self.ram.store(header + 8, sector);
        self.ram.store(header + STATUS, 0xff_u8);
        slot
    }

    #[inline]
    fn header(&self, slot: u16) -> usize {
        self.places.headers + usize::from(slot) * HEADER
    }

    #[inline]
    fn data_at(&self, slot: u16) -> usize {
        self.places.data + usize::from(slot) * self.bytes
    }

    /// The chain of a well-formed request: header, `bytes` of data, status.
    #[inline]
    #[must_use]
    pub fn parts(&self, slot: u16, bytes: u32, data_flags: u16) -> [Part; 3] {
        let header = Ram::guest(self.header(slot));
        [
            Part { addr: header, len: 16, flags: 0 },
            Part { addr: Ram::guest(self.data_at(slot)), len: bytes, flags: data_flags },
            Part { addr: header + STATUS as u64, len: 1, flags: Part::WRITABLE },
        ]
    }

    /// Offers a chain of up to three `parts`, whatever they say, as the request of `slot`; through a table where indirect
    /// descriptors were negotiated. The device is not told before [`Self::publish`].
    #[inline]
    pub fn offer(&mut self, slot: u16, parts: &[Part]) {
        if !self.indirect {
            return self.offer_linked(slot, parts);
        }
        let table = self.places.tables + usize::from(slot) * TABLE;
        match self.layout {
            Layout::Split(_) => Split::write_table(&self.ram, table, 0, parts),
            Layout::Packed(_) => Packed::write_table(&self.ram, table, parts),
        }
        let len = u32::try_from(parts.len() * DESC).expect("a short table");
        self.offer_linked(slot, &[Part { addr: Ram::guest(table), len, flags: Part::TABLE }]);
    }

    /// The same without a table of its own.
    #[inline]
    pub fn offer_linked(&mut self, slot: u16, parts: &[Part]) {
        either!(self, ring => ring.offer(slot, parts));
    }

    /// Fills a slot and offers it.
    ///
    /// # Panics
    /// If all slots are taken, or the request is larger than the client was made for.
    #[inline]
    pub fn submit(&mut self, request: Request) -> u16 {
        let (kind, sector, bytes, flags) = match request {
            Request::Read { sector, bytes } => (0, sector, bytes, Part::WRITABLE),
            Request::Write { sector, bytes } => (1, sector, bytes, 0),
            Request::Flush => (4, 0, 0, 0),
        };
        assert!(bytes <= self.bytes, "{request:?} in slots of {} bytes", self.bytes);
        let slot = self.prepare(kind, sector);
        let [header, data, status] = self.parts(slot, u32::try_from(bytes).expect("small"), flags);
        if bytes == 0 {
            self.offer(slot, &[header, status]);
        } else {
            self.offer(slot, &[header, data, status]);
        }
        slot
    }

    /// Shows the device everything offered, and kicks it if it wants to be. True if it was kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let wanted = either!(self, ring => ring.publish());
        if wanted {
            self.kicks += 1;
            self.kick.write(1).expect("an eventfd that is read takes a write");
        }
        wanted
    }

    /// Takes one finished request off the ring.
    ///
    /// # Panics
    /// If the device names a request that it does not have.
    #[inline]
    pub fn reap(&mut self) -> Option<Done> {
        let (slot, written) = either!(self, ring => ring.take())?;
        let away = self.away.get_mut(usize::from(slot)).expect("a slot that exists");
        assert!(std::mem::replace(away, false), "slot {slot} has come back twice");
        self.free.push(slot);
        Some(Done { slot, status: self.ram.load(self.header(slot) + STATUS), written })
    }

    /// Tells the device that nobody waits for calls, for a client that polls.
    #[inline]
    pub fn silence(&mut self) {
        either!(self, ring => ring.want_call(false));
    }

    /// Waits for a finished request, asleep; `None` if there is none within `limit`.
    ///
    /// # Errors
    /// Of `epoll_wait`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Done>, Error> {
        let start = Instant::now();
        loop {
            either!(self, ring => ring.want_call(true));
            if let Some(done) = self.reap() {
                return Ok(Some(done));
            }
            let Some(rest) = limit.checked_sub(start.elapsed()) else { return Ok(None) };
            // Rounded up: a wait of less than a millisecond is no wait.
            let milliseconds = i32::try_from(rest.as_millis() + 1).unwrap_or(i32::MAX);
            match self.sleep.wait(milliseconds, &mut [EpollEvent::default()]) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
                // It is empty if the time is over.
                _ => drop(self.call.read()),
            }
        }
    }

    /// Offers what no ring can hold, kicks, and waits until the device gives the ring up; false if it does not. Nothing may
    /// be in flight, and nothing is served any more.
    ///
    /// # Errors
    /// Of `poll`.
    pub fn break_rules(&mut self, limit: Duration) -> Result<bool, Error> {
        either!(self, ring => ring.break_rules());
        either!(self, ring => ring.publish());
        self.kick.write(1)?;
        let gone = Epoll::new()?;
        gone.ctl(ControlOperation::Add, self.err.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let milliseconds = i32::try_from(limit.as_millis())?;
        Ok(gone.wait(milliseconds, &mut [EpollEvent::default()])? == 1)
    }

    /// Fills a slot's data; between submit and publish.
    ///
    /// # Panics
    /// If there is more than fits.
    pub fn set_data(&self, slot: u16, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes in slots of {}", bytes.len(), self.bytes);
        self.ram.write(self.data_at(slot), bytes);
    }

    /// A slot's data.
    ///
    /// # Panics
    /// If more is asked for than there is.
    pub fn data(&self, slot: u16, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes in slots of {}", bytes.len(), self.bytes);
        self.ram.read(self.data_at(slot), bytes);
    }
}
