//! Test rig: an engine on a disk in memory, guest memory, and a virtio driver that can also break the rules.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::disk::{DiskOptions, FakeDisk};
use crate::addr::{Gpa, IovaSlice, Qva, Span};
use crate::engine::{Engine, Layout, Options, VringSetup};
use crate::hardware::AddressSpace;
use crate::memory::{MemTable, Region, RegionSpec};
use crate::sys::SharedMemory;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;

/// Start and size of the first region.
pub(super) const BASE: u64 = 0x10_0000;
pub(super) const LEN: u64 = 0x40_0000;
/// Each ring has 64 KiB from the start of the region. Headers and status bytes follow, then data.
const RING_STRIDE: u64 = 0x1_0000;
const HEADERS: u64 = 0x10_0000;
pub(super) const DATA: u64 = BASE + 0x20_0000;
/// Limit of all waits.
const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn region(gpa: u64, len: u64) -> Arc<Region> {
    region_in(gpa, len, IovaSlice::WHOLE)
}

pub(super) fn region_in(gpa: u64, len: u64, slice: IovaSlice) -> Arc<Region> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len).unwrap();
    let gpa = Span::new(Gpa(gpa), len).unwrap();
    let spec = RegionSpec { gpa, qva: Qva(gpa.start().0), offset: 0, file: Arc::new(file) };
    Arc::new(Region::map_in(spec, slice).unwrap())
}

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Reads and resets an eventfd's counter.
pub(super) fn count(event: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(event, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

/// Waits until `event` is readable. Returns false after `limit`.
pub(super) fn wait_readable(event: &OwnedFd, limit: Duration) -> bool {
    let time = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&time)).unwrap() == 1
}

/// Waits until `condition` holds.
pub(super) fn wait_until(name: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "timed out: {name}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// An engine on a disk in memory, with one region of guest memory.
pub(super) struct Rig {
    pub(super) engine: Engine,
    pub(super) disk: FakeDisk,
    pub(super) region: Arc<Region>,
    pub(super) table: Arc<MemTable>,
}

impl Rig {
    pub(super) fn new(options: DiskOptions) -> Self {
        let (spin, drain_timeout) = (Duration::from_micros(50), Duration::from_secs(20));
        let (watch, placement) = (crate::engine::WatchdogOptions::default(), Default::default());
        Self::with(options, Options { rings: 4, spin, drain_timeout, watch, placement })
    }

    pub(super) fn with(disk: DiskOptions, options: Options) -> Self {
        let disk = FakeDisk::new(disk);
        let space: Arc<dyn AddressSpace> = Arc::new(disk.clone());
        let engine = Engine::start(Box::new(disk.clone()), &space, options).unwrap();
        let region = region(BASE, LEN);
        disk.add(&region).unwrap();
        let table = Arc::new(MemTable::new(vec![Arc::clone(&region)]).unwrap());
        engine.publish(Arc::clone(&table));
        Self { engine, disk, region, table }
    }

    /// A driver for virtqueue `index`, with its ring started and enabled.
    pub(super) fn driver(&self, index: usize, options: RingOptions) -> SplitDriver {
        let (driver, setup) = self.stopped_driver(index, options);
        self.engine.start_ring(setup).unwrap();
        self.engine.set_enabled(index, true);
        driver
    }

    /// A driver for virtqueue `index`, and the parameters to start its ring.
    pub(super) fn stopped_driver(&self, index: usize, options: RingOptions) -> (SplitDriver, VringSetup) {
        let memory = self.region.memory().clone();
        SplitDriver::new(memory, index, options)
    }
}

/// Options of a ring.
#[derive(Clone, Copy)]
pub(super) struct RingOptions {
    pub(super) size: u16,
    pub(super) event_idx: bool,
    pub(super) base: u16,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self { size: 64, event_idx: false, base: 0 }
    }
}

/// A descriptor to write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Desc {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// A guest's virtio-blk driver for one ring.
pub(super) struct SplitDriver {
    pub(super) memory: SharedMemory,
    pub(super) index: usize,
    pub(super) size: u16,
    event_idx: bool,
    desc: u64,
    avail: u64,
    used: u64,
    pub(super) avail_idx: u16,
    used_seen: u16,
    next_desc: u16,
    next_header: u64,
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
    pub(super) err: OwnedFd,
}

impl SplitDriver {
    pub(super) fn new(memory: SharedMemory, index: usize, options: RingOptions) -> (Self, VringSetup) {
        let (desc, headers) = (BASE + RING_STRIDE * index as u64, BASE + HEADERS + 0x1_0000 * index as u64);
        Self::at_addresses(memory, index, options, (desc, headers))
    }

    /// A driver with its ring and headers, 64 KiB each, at the given addresses.
    pub(super) fn at_addresses(
        memory: SharedMemory,
        index: usize,
        options: RingOptions,
        addresses: (u64, u64),
    ) -> (Self, VringSetup) {
        let RingOptions { size, event_idx, base } = options;
        let (desc, next_header) = addresses;
        let (avail, used) = (desc + 0x4000, desc + 0x8000);
        let driver = Self {
            memory,
            index,
            size,
            event_idx,
            desc,
            avail,
            used,
            avail_idx: base,
            used_seen: base,
            next_desc: 0,
            next_header,
            kick: event(),
            call: event(),
            err: event(),
        };
        driver.memory.write_u16(driver.at(avail + 2), base);
        driver.memory.write_u16(driver.at(used + 2), base);
        let setup = driver.setup(base);
        (driver, setup)
    }

    /// The parameters to start this driver's ring at `base`.
    pub(super) fn setup(&self, base: u16) -> VringSetup {
        let span = |start, len: u64| Span::new(Gpa(start), len).unwrap();
        let duplicate = |fd: &OwnedFd| Some(fd.try_clone().unwrap());
        let n = u64::from(self.size);
        VringSetup {
            index: self.index,
            layout: Layout::Split,
            size: self.size,
            desc: span(self.desc, 16 * n),
            avail: span(self.avail, 6 + 2 * n),
            used: span(self.used, 6 + 8 * n),
            base: base.into(),
            event_idx: self.event_idx,
            indirect: true,
            kick: duplicate(&self.kick),
            call: duplicate(&self.call),
            err: duplicate(&self.err),
            used_log: None,
            inflight: None,
        }
    }

    pub(super) fn at(&self, gpa: u64) -> usize {
        (gpa - BASE) as usize
    }

    pub(super) fn fill(&self, gpa: u64, bytes: &[u8]) {
        self.memory.copy_from(self.at(gpa), bytes);
    }

    pub(super) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.copy_to(self.at(gpa), &mut bytes);
        bytes
    }

    pub(super) fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        let at = self.at(table + 16 * u64::from(index));
        self.memory.write_u64(at, desc.addr);
        self.memory.write_u32(at + 8, desc.len);
        self.memory.write_u16(at + 12, desc.flags);
        self.memory.write_u16(at + 14, desc.next);
    }

    /// Writes linked descriptors to the table. Returns the head.
    pub(super) fn link(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_desc;
        for (n, &(addr, len, flags)) in parts.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (index + 1) % self.size;
            let more = if n + 1 < parts.len() { NEXT } else { 0 };
            self.write_desc(self.desc, index, Desc { addr, len, flags: flags | more, next: self.next_desc });
        }
        head
    }

    /// Writes one descriptor unchanged. Returns its index.
    pub(super) fn raw(&mut self, desc: Desc) -> u16 {
        let index = self.next_desc;
        self.next_desc = (index + 1) % self.size;
        self.write_desc(self.desc, index, desc);
        index
    }

    /// Makes a chain available, without a kick.
    pub(super) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.memory.write_u16(self.at(self.avail + 4 + 2 * slot), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.memory.store_release_u16(self.at(self.avail + 2), self.avail_idx);
    }

    pub(super) fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.memory.store_release_u16(self.at(self.avail + 2), idx);
    }

    pub(super) fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    /// Kicks if the device requires it after the avail index was `before` (virtio 1.2 §2.7.10).
    pub(super) fn kick_if_needed(&self, before: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let required = if self.event_idx {
            self.avail_idx.wrapping_sub(self.avail_event()).wrapping_sub(1) < self.avail_idx.wrapping_sub(before)
        } else {
            self.used_flags() & 1 == 0
        };
        if required {
            self.kick();
        }
    }

    /// Waits for `n` used entries with the call eventfd. Enables calls only while the used ring is empty.
    pub(super) fn wait_for_calls(&mut self, n: usize) -> Vec<(u32, u32)> {
        let mut seen = Vec::new();
        while seen.len() < n {
            if self.event_idx {
                self.set_used_event(self.used_seen);
            } else {
                self.set_avail_flags(0);
            }
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if self.used_seen == self.used_idx() {
                assert!(wait_readable(&self.call, LIMIT), "no call");
            }
            count(&self.call);
            if !self.event_idx {
                self.set_avail_flags(1);
            }
            seen.extend(self.used());
        }
        seen
    }

    /// Writes a header to guest memory, followed by a status byte of 0xff.
    pub(super) fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let at = self.next_header;
        // Headers wrap around in the driver's 64 KiB. No test has that many requests in flight.
        self.next_header = (at & !0xffff) + (at + 32) % 0x1_0000;
        self.memory.write_u32(self.at(at), kind);
        self.memory.write_u32(self.at(at + 4), 0);
        self.memory.write_u64(self.at(at + 8), sector);
        self.memory.write_u8(self.at(at + 16), 0xff);
        at
    }

    /// Makes a request of header, data and status available.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> SentRequest {
        let header = self.header(kind, sector);
        let flags = if kind == OUT { 0 } else { WRITE };
        let mut parts = vec![(header, 16, 0)];
        parts.extend(data.iter().map(|&(addr, len)| (addr, len, flags)));
        parts.push((header + 16, 1, WRITE));
        let head = self.link(&parts);
        self.offer(head);
        SentRequest { head, status: header + 16 }
    }

    /// Makes a request available and kicks.
    pub(super) fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> SentRequest {
        let sent = self.request(kind, sector, data);
        self.kick();
        sent
    }

    pub(super) fn status(&self, sent: SentRequest) -> u8 {
        self.memory.read_u8(self.at(sent.status))
    }

    pub(super) fn used_idx(&self) -> u16 {
        self.memory.load_acquire_u16(self.at(self.used + 2))
    }

    pub(super) fn used_flags(&self) -> u16 {
        self.memory.read_u16(self.at(self.used))
    }

    pub(super) fn avail_event(&self) -> u16 {
        self.memory.read_u16(self.at(self.used + 4 + 8 * u64::from(self.size)))
    }

    pub(super) fn set_avail_flags(&self, flags: u16) {
        self.memory.write_u16(self.at(self.avail), flags);
    }

    pub(super) fn set_used_event(&self, idx: u16) {
        assert!(self.event_idx);
        self.memory.write_u16(self.at(self.avail + 4 + 2 * u64::from(self.size)), idx);
    }

    /// New used entries: (head, len).
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.used_seen != self.used_idx() {
            let at = self.at(self.used + 4 + 8 * u64::from(self.used_seen % self.size));
            entries.push((self.memory.read_u32(at), self.memory.read_u32(at + 4)));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        entries
    }

    /// Waits for `count` used entries.
    pub(super) fn wait(&mut self, count: usize) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        wait_until("used entries", || {
            entries.extend(self.used());
            entries.len() >= count
        });
        assert_eq!(entries.len(), count, "used entries: {entries:?}");
        entries
    }
}

/// A request that has been made available.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentRequest {
    pub(super) head: u16,
    pub(super) status: u64,
}
