//! A guest's driver for a packed ring, written from virtio 1.2 §2.8 alone. It counts all descriptors since the start, where the
//! device keeps positions and wrap counters.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use super::rig::*;
use crate::engine::{Layout, VringSetup};
use crate::sys::SharedMemory;

const AVAIL: u16 = 0x80;
const USED: u16 = 0x8000;
// desc_event_flags.
pub(super) const ENABLE: u16 = 0;
pub(super) const DISABLE: u16 = 1;
pub(super) const DESC: u16 = 2;

/// A driver with a packed ring. Memory, headers and eventfds are those of a split driver.
pub(super) struct PackedDriver {
    pub(super) guest: SplitDriver,
    pub(super) ring: u64,
    driver_area: u64,
    device_area: u64,
    pub(super) size: u64,
    event_idx: bool,
    /// Counts of descriptors made available and found used, from slot 0 in a round with wrap counter 1.
    pub(super) avail: u64,
    pub(super) used: u64,
    /// Number of descriptors of each outstanding buffer ID.
    outstanding: HashMap<u16, u64>,
    next_id: u16,
}

impl PackedDriver {
    pub(super) fn new(memory: SharedMemory, index: usize, options: RingOptions) -> (Self, VringSetup) {
        let (guest, setup) = SplitDriver::new(memory, index, options);
        Self::over(guest, setup, options)
    }

    /// Puts a packed ring in the memory of `guest`'s split ring.
    pub(super) fn over(guest: SplitDriver, setup: VringSetup, options: RingOptions) -> (Self, VringSetup) {
        let [ring, driver_area, device_area] = [setup.desc, setup.avail, setup.used].map(|span| span.start().0);
        let count = u64::from(options.base);
        let mut driver = Self {
            guest,
            ring,
            driver_area,
            device_area,
            size: options.size.into(),
            event_idx: options.event_idx,
            avail: count,
            used: count,
            outstanding: HashMap::new(),
            next_id: 0xfff0,
        };
        // No descriptor is available at the start, in either round.
        for slot in 0..driver.size {
            let before = if count % driver.size > slot { count } else { count + driver.size };
            let flags = if driver.wrap(before) { USED | AVAIL } else { 0 };
            driver.put(slot, Desc { addr: 0, len: 0, flags: 0, next: 0 }, 0, flags);
        }
        driver.set_driver_event(0, ENABLE);
        let setup = driver.restart(setup);
        (driver, setup)
    }

    /// `setup` at this driver's current position.
    pub(super) fn restart(&mut self, setup: VringSetup) -> VringSetup {
        let base = u32::from(self.raw(self.avail)) | u32::from(self.raw(self.used)) << 16;
        VringSetup { layout: Layout::Packed, base, ..setup }
    }

    pub(super) fn wrap(&self, count: u64) -> bool {
        (count / self.size).is_multiple_of(2)
    }

    /// The position of a count: slot and wrap counter.
    pub(super) fn raw(&self, count: u64) -> u16 {
        let slot = u16::try_from(count % self.size).unwrap();
        if self.wrap(count) { slot | 0x8000 } else { slot }
    }

    /// AVAIL and USED flags of the available descriptor with number `count`.
    pub(super) fn flags_at(&self, count: u64) -> u16 {
        if self.wrap(count) { AVAIL } else { USED }
    }

    /// Writes a descriptor, its flags last.
    pub(super) fn put(&self, slot: u64, desc: Desc, id: u16, flags: u16) {
        let at = self.guest.at(self.ring + 16 * slot);
        self.guest.memory.write_u64(at, desc.addr);
        self.guest.memory.write_u32(at + 8, desc.len);
        self.guest.memory.write_u16(at + 12, id);
        self.guest.memory.store_release_u16(at + 14, desc.flags | flags);
    }

    /// True if the ring has room for `descriptors` more.
    pub(super) fn has_room(&self, descriptors: u64) -> bool {
        self.avail - self.used + descriptors <= self.size
    }

    /// Makes a chain available unchanged. Returns the buffer ID, which is in the last descriptor.
    pub(super) fn offer(&mut self, parts: &[Desc]) -> u16 {
        assert!(self.has_room(parts.len() as u64), "the test makes too many descriptors available");
        self.next_id = self.next_id.wrapping_add(7);
        let id = self.next_id;
        let len = parts.len() as u64;
        for (n, part) in parts.iter().enumerate().rev() {
            let count = self.avail + n as u64;
            let last = n + 1 == parts.len();
            // Only the last descriptor's ID counts.
            self.put(count % self.size, *part, if last { id } else { 0xdead }, self.flags_at(count));
        }
        self.avail += len;
        assert_eq!(self.outstanding.insert(id, len), None);
        id
    }

    /// Makes a chain available, as linked descriptors or through a table at `table`.
    pub(super) fn offer_linked(&mut self, parts: &[(u64, u32, u16)], table: Option<u64>) -> u16 {
        let Some(table) = table else {
            let more = |n| if n + 1 < parts.len() { NEXT } else { 0 };
            let descs = parts.iter().enumerate();
            let descs = descs.map(|(n, &(addr, len, flags))| Desc { addr, len, flags: flags | more(n), next: 0 });
            return self.offer(&descs.collect::<Vec<_>>());
        };
        for (n, &(addr, len, flags)) in parts.iter().enumerate() {
            self.write_entry(table + 16 * n as u64, Desc { addr, len, flags, next: 0 });
        }
        self.offer(&[Desc { addr: table, len: 16 * parts.len() as u32, flags: INDIRECT, next: 0 }])
    }

    /// Writes an entry of an indirect table. Its ID is reserved.
    pub(super) fn write_entry(&self, at: u64, desc: Desc) {
        let at = self.guest.at(at);
        self.guest.memory.write_u64(at, desc.addr);
        self.guest.memory.write_u32(at + 8, desc.len);
        self.guest.memory.write_u16(at + 12, 0xbeef);
        self.guest.memory.write_u16(at + 14, desc.flags);
    }

    /// Makes a request of header, data and status available.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> SentRequest {
        let header = self.guest.header(kind, sector);
        let flags = if kind == OUT { 0 } else { WRITE };
        let mut parts = vec![(header, 16, 0)];
        parts.extend(data.iter().map(|&(addr, len)| (addr, len, flags)));
        parts.push((header + 16, 1, WRITE));
        let head = self.offer_linked(&parts, None);
        SentRequest { head, status: header + 16 }
    }

    pub(super) fn send(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> SentRequest {
        let sent = self.request(kind, sector, data);
        self.guest.kick();
        sent
    }

    /// True if there is a new used descriptor.
    pub(super) fn sees_used(&self) -> bool {
        let at = self.guest.at(self.ring + 16 * (self.used % self.size));
        let flags = self.guest.memory.load_acquire_u16(at + 14);
        let wrap = self.wrap(self.used);
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
    }

    /// New used chains: (ID, length written).
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.avail != self.used && self.sees_used() {
            let at = self.guest.at(self.ring + 16 * (self.used % self.size));
            let memory = &self.guest.memory;
            let (len, id, flags) = (memory.read_u32(at + 8), memory.read_u16(at + 12), memory.read_u16(at + 14));
            assert_eq!(flags & !(AVAIL | USED | WRITE), 0, "reserved flags of a used descriptor");
            self.used += self.outstanding.remove(&id).expect("an ID that is outstanding");
            assert_eq!(flags & WRITE != 0, len != 0, "WRITE is set if and only if len is not 0 (virtio 1.2 §2.8.3)");
            entries.push((id.into(), len));
        }
        entries
    }

    pub(super) fn wait(&mut self, count: usize) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        wait_until("used descriptors", || {
            entries.extend(self.used());
            entries.len() >= count
        });
        assert_eq!(entries.len(), count, "used descriptors: {entries:?}");
        entries
    }

    /// Writes the driver event suppression structure.
    pub(super) fn set_driver_event(&self, off_wrap: u16, flags: u16) {
        let at = self.guest.at(self.driver_area);
        self.guest.memory.write_u16(at, off_wrap);
        self.guest.memory.store_release_u16(at + 2, flags);
    }

    /// The device event suppression structure: position and flags.
    pub(super) fn device_event(&self) -> (u16, u16) {
        let at = self.guest.at(self.device_area);
        let flags = self.guest.memory.load_acquire_u16(at + 2);
        (self.guest.memory.read_u16(at), flags)
    }

    /// Kicks if the device requires it after `before` descriptors were available (virtio 1.2 §2.8.10).
    pub(super) fn kick_if_needed(&self, before: u64) {
        fence(Ordering::SeqCst);
        let (off_wrap, flags) = self.device_event();
        let required = match flags {
            ENABLE => true,
            DISABLE => false,
            DESC => {
                assert!(self.event_idx, "not negotiated");
                (before..self.avail).any(|count| self.raw(count) == off_wrap)
            }
            other => panic!("reserved event flags {other}"),
        };
        if required {
            self.guest.kick();
        }
    }

    /// Waits for `n` used chains with the call eventfd. Enables calls only while there is no used descriptor.
    pub(super) fn wait_for_calls(&mut self, n: usize) -> Vec<(u32, u32)> {
        let mut seen = Vec::new();
        while seen.len() < n {
            if self.event_idx {
                self.set_driver_event(self.raw(self.used), DESC);
            } else {
                self.set_driver_event(0, ENABLE);
            }
            fence(Ordering::SeqCst);
            if !self.sees_used() {
                assert!(wait_readable(&self.guest.call, Duration::from_secs(20)), "no call");
            }
            count(&self.guest.call);
            self.set_driver_event(0, DISABLE);
            seen.extend(self.used());
        }
        seen
    }
}
