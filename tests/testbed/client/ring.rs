//! A split virtqueue as the guest's driver sees it (virtio 1.2 §2.7), with requests for a block device (§5.2.6).
//!
//! ```text
//! free ── submit ──► filled ── publish ──► the device's ── reap / wait ──► free
//! ```

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{EVENT_IDX, Error, GUEST_BASE, INDIRECT, Shape};

const PAGE: usize = 4096;
/// Bytes of a descriptor, and of an indirect table of three padded to a power of two.
const DESC: usize = 16;
const TABLE: usize = 64;
/// Bytes set aside for a header and, at 16, the status.
const HEADER: usize = 64;
const STATUS: usize = 16;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const IS_TABLE: u16 = 4;

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
}

/// Where the parts lie, offsets into the memory file.
#[derive(Clone, Copy)]
struct Places {
    desc: usize,
    avail: usize,
    used: usize,
    tables: usize,
    headers: usize,
    data: usize,
    end: usize,
}

impl Places {
    fn new(index: usize, shape: Shape) -> Self {
        let (size, depth) = (usize::from(ring_size(shape)), usize::from(shape.depth));
        let start = |relative: Self| relative.end * index;
        let pages = |bytes: usize| bytes.next_multiple_of(PAGE);
        let avail = pages(size * DESC);
        let used = avail + pages(6 + 2 * size);
        let tables = used + pages(6 + 8 * size);
        let headers = tables + pages(depth * TABLE);
        let data = headers + pages(depth * HEADER);
        let end = data + depth * shape.bytes;
        let relative = Self { desc: 0, avail, used, tables, headers, data, end };
        let by = start(relative);
        Self {
            desc: by,
            avail: avail + by,
            used: used + by,
            tables: tables + by,
            headers: headers + by,
            data: data + by,
            end: end + by,
        }
    }
}

/// Bytes of memory for one ring and its requests.
pub(super) fn bytes_needed(shape: Shape) -> usize {
    Places::new(0, shape).end
}

/// With room for the descriptors of all requests, whether or not they lie in tables.
fn ring_size(shape: Shape) -> u16 {
    (shape.depth * 3).next_power_of_two()
}

/// One virtqueue.
pub struct Ring {
    memory: Arc<MmapRegion>,
    places: Places,
    size: u16,
    depth: u16,
    bytes: usize,
    indirect: bool,
    event_idx: bool,
    free: Vec<u16>,
    /// Next index of the available ring; what has been published; the device's index as last read.
    next: u16,
    published: u16,
    seen: u16,
    kick: EventFd,
    call: EventFd,
    sleep: Epoll,
    /// How often the device has been kicked.
    pub kicks: u64,
}

impl Ring {
    pub(super) fn new(memory: &Arc<MmapRegion>, index: usize, shape: Shape, features: u64) -> Result<Self, Error> {
        assert!((1..=256).contains(&shape.depth) && shape.bytes.is_multiple_of(PAGE), "{shape:?}");
        let (call, sleep) = (EventFd::new(EFD_NONBLOCK)?, Epoll::new()?);
        sleep.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        Ok(Self {
            memory: Arc::clone(memory),
            places: Places::new(index, shape),
            size: ring_size(shape),
            depth: shape.depth,
            bytes: shape.bytes,
            indirect: features & INDIRECT != 0,
            event_idx: features & EVENT_IDX != 0,
            free: (0..shape.depth).rev().collect(),
            next: 0,
            published: 0,
            seen: 0,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call,
            sleep,
            kicks: 0,
        })
    }

    /// Sets the ring up on the server's side and enables it.
    pub(super) fn start(&self, frontend: &mut Frontend, index: usize) -> Result<(), Error> {
        let at = |offset: usize| self.memory.as_ptr() as u64 + offset as u64;
        frontend.set_vring_num(index, self.size)?;
        frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: self.size,
                queue_size: self.size,
                flags: 0,
                desc_table_addr: at(self.places.desc),
                used_ring_addr: at(self.places.used),
                avail_ring_addr: at(self.places.avail),
                log_addr: None,
            },
        )?;
        frontend.set_vring_base(index, 0)?;
        frontend.set_vring_call(index, &self.call)?;
        frontend.set_vring_kick(index, &self.kick)?;
        frontend.set_vring_enable(index, true)?;
        Ok(())
    }

    #[inline]
    fn memory(&self) -> VolatileSlice<'_> {
        self.memory.as_volatile_slice()
    }

    /// True if another request can be submitted.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// True if nothing is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == usize::from(self.depth)
    }

    /// Fills a slot and puts it on the available ring, which the device is not told before [`Self::publish`].
    ///
    /// # Panics
    /// If all slots are taken, or the request is larger than the client was made for.
    pub fn submit(&mut self, request: Request) -> u16 {
        let slot = self.free.pop().expect("a free slot");
        let (kind, sector, bytes, flags) = match request {
            Request::Read { sector, bytes } => (0_u64, sector, bytes, WRITABLE),
            Request::Write { sector, bytes } => (1, sector, bytes, 0),
            Request::Flush => (4, 0, 0, 0),
        };
        assert!(bytes <= self.bytes, "{request:?} in slots of {} bytes", self.bytes);
        let n = usize::from(slot);
        let header = self.places.headers + n * HEADER;
        self.put(header, [kind, sector]);
        self.memory().write_obj(0xff_u8, header + STATUS).expect("inside the memory");
        let head = slot * 3;
        let (table, first) = if self.indirect { (self.places.tables + n * TABLE, 0) } else { (self.desc(head), head) };
        let mut parts =
            [(header, 16, 0), (self.places.data + n * self.bytes, bytes, flags), (header + STATUS, 1, WRITABLE)];
        if bytes == 0 {
            parts[1] = parts[2];
        }
        let count = if bytes == 0 { 2 } else { 3_u16 };
        for (i, (at, len, flags)) in (0..count).zip(parts) {
            let flags = flags | if i + 1 < count { NEXT } else { 0 };
            self.put_descriptor(table + usize::from(i) * DESC, at, len, flags, first + i + 1);
        }
        if self.indirect {
            self.put_descriptor(self.desc(head), table, usize::from(count) * DESC, IS_TABLE, 0);
        }
        let place = self.places.avail + 4 + 2 * usize::from(self.next % self.size);
        self.memory().write_obj(head, place).expect("inside the memory");
        self.next = self.next.wrapping_add(1);
        slot
    }

    fn desc(&self, index: u16) -> usize {
        self.places.desc + usize::from(index) * DESC
    }

    fn put(&self, at: usize, words: [u64; 2]) {
        self.memory().write_obj(words, at).expect("inside the memory");
    }

    fn put_descriptor(&self, at: usize, target: usize, len: usize, flags: u16, next: u16) {
        self.put(at, [GUEST_BASE + target as u64, len as u64 | u64::from(flags) << 32 | u64::from(next) << 48]);
    }

    /// Shows the device everything submitted, and kicks it if it wants to be. True if it was kicked.
    pub fn publish(&mut self) -> bool {
        let memory = self.memory();
        let load = |at: usize| memory.load::<u16>(at, Ordering::Acquire).expect("inside the memory");
        memory.store(self.next, self.places.avail + 2, Ordering::Release).expect("inside the memory");
        // The index is seen before the device's wish is read; the device does the two in the other order.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = load(self.places.used + 4 + 8 * usize::from(self.size));
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(self.published)
        } else {
            load(self.places.used) & 1 == 0
        };
        self.published = self.next;
        if wanted {
            self.kicks += 1;
            self.kick.write(1).expect("an eventfd that is read takes a write");
        }
        wanted
    }

    /// Takes one finished request off the ring.
    pub fn reap(&mut self) -> Option<Done> {
        let memory = self.memory.as_volatile_slice();
        let index: u16 = memory.load(self.places.used + 2, Ordering::Acquire).expect("inside the memory");
        if index == self.seen {
            return None;
        }
        let entry = self.places.used + 4 + 8 * usize::from(self.seen % self.size);
        let head: u32 = memory.read_obj(entry).expect("inside the memory");
        self.seen = self.seen.wrapping_add(1);
        let slot = u16::try_from(head / 3).expect("a head that was published");
        let status = memory.read_obj(self.places.headers + usize::from(slot) * HEADER + STATUS);
        assert!(!self.free.contains(&slot), "slot {slot} has come back twice");
        self.free.push(slot);
        Some(Done { slot, status: status.expect("inside the memory") })
    }

    /// Tells the device that nobody waits for calls, for a client that polls.
    pub fn silence(&mut self) {
        self.want_call_at(self.seen.wrapping_add(0x7fff));
    }

    fn want_call_at(&self, index: u16) {
        let memory = self.memory();
        let place = self.places.avail + 4 + 2 * usize::from(self.size);
        memory.store(index, place, Ordering::Release).expect("inside the memory");
        fence(Ordering::SeqCst);
    }

    /// Waits for a finished request, asleep; `None` if there is none within `limit`.
    ///
    /// # Errors
    /// Of `epoll_wait`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Done>, Error> {
        let start = Instant::now();
        loop {
            self.want_call_at(self.seen);
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

    /// Fills a slot's data; between submit and publish.
    ///
    /// # Panics
    /// If there is more than fits.
    pub fn set_data(&self, slot: u16, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes in slots of {}", bytes.len(), self.bytes);
        let at = self.places.data + usize::from(slot) * self.bytes;
        self.memory().write_slice(bytes, at).expect("inside the memory");
    }

    /// A slot's data.
    ///
    /// # Panics
    /// If more is asked for than there is.
    pub fn data(&self, slot: u16, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.bytes, "{} bytes in slots of {}", bytes.len(), self.bytes);
        let at = self.places.data + usize::from(slot) * self.bytes;
        self.memory().read_slice(bytes, at).expect("inside the memory");
    }
}
