//! A guest's driver for a packed ring, written from virtio 1.2 §2.8 and from nothing else: it counts descriptors from the
//! beginning of time, where the device keeps places and wrap counters.

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

/// The driver's ring. Memory, headers and eventfds are those of an ordinary driver.
pub(super) struct PackedDriver {
    pub(super) guest: SplitDriver,
    pub(super) ring: u64,
    driver_area: u64,
    device_area: u64,
    pub(super) size: u64,
    event_idx: bool,
    /// Descriptors made available, and found used, since the wrap counter was last 1 at slot 0.
    pub(super) avail: u64,
    pub(super) used: u64,
    /// How many descriptors each buffer ID stands for.
    outstanding: HashMap<u16, u64>,
    next_id: u16,
}

impl PackedDriver {
    pub(super) fn new(memory: SharedMemory, index: usize, options: RingOptions) -> (Self, VringSetup) {
        let (guest, setup) = SplitDriver::new(memory, index, options);
        Self::over(guest, setup, options)
    }

    /// Puts a packed ring where `guest` would have its split one.
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
        // Nothing is available at the start, whichever round it is.
        for slot in 0..driver.size {
            let before = if count % driver.size > slot { count } else { count + driver.size };
            let flags = if driver.wrap(before) { USED | AVAIL } else { 0 };
            driver.put(slot, Desc { addr: 0, len: 0, flags: 0, next: 0 }, 0, flags);
        }
        driver.set_driver_event(0, ENABLE);
        let setup = driver.restart(setup);
        (driver, setup)
    }

    /// `setup` where this driver stands now.
    pub(super) fn restart(&mut self, setup: VringSetup) -> VringSetup {
        let base = u32::from(self.raw(self.avail)) | u32::from(self.raw(self.used)) << 16;
        VringSetup { layout: Layout::Packed, base, ..setup }
    }

    pub(super) fn wrap(&self, count: u64) -> bool {
        (count / self.size).is_multiple_of(2)
    }

    /// A count as slot and wrap counter.
    pub(super) fn raw(&self, count: u64) -> u16 {
        let slot = u16::try_from(count % self.size).unwrap();
        if self.wrap(count) { slot | 0x8000 } else { slot }
    }

    /// Flags of a descriptor that is made available as number `count`.
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

    /// True if the ring has room for so many more descriptors.
    pub(super) fn has_room(&self, descriptors: u64) -> bool {
        self.avail - self.used + descriptors <= self.size
    }

    /// Makes a chain available as it is; the last descriptor has the ID returned.
    pub(super) fn offer(&mut self, parts: &[Desc]) -> u16 {
        assert!(self.has_room(parts.len() as u64), "the driver itself breaks the rules");
        self.next_id = self.next_id.wrapping_add(7);
        let id = self.next_id;
        let len = parts.len() as u64;
        for (n, part) in parts.iter().enumerate().rev() {
            let count = self.avail + n as u64;
            let last = n + 1 == parts.len();
            // An ID means something in the last descriptor only.
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

    /// Writes an entry of an indirect table; its ID is reserved.
    pub(super) fn write_entry(&self, at: u64, desc: Desc) {
        let at = self.guest.at(at);
        self.guest.memory.write_u64(at, desc.addr);
        self.guest.memory.write_u32(at + 8, desc.len);
        self.guest.memory.write_u16(at + 12, 0xbeef);
        self.guest.memory.write_u16(at + 14, desc.flags);
    }

    /// Offers a request of the fast options.
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

    /// True if there is a used descriptor not yet seen.
    pub(super) fn sees_used(&self) -> bool {
        let at = self.guest.at(self.ring + 16 * (self.used % self.size));
        let flags = self.guest.memory.load_acquire_u16(at + 14);
        let wrap = self.wrap(self.used);
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
    }

    /// Used chains not yet seen: (ID, length written).
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.avail != self.used && self.sees_used() {
            let at = self.guest.at(self.ring + 16 * (self.used % self.size));
            let memory = &self.guest.memory;
            let (len, id, flags) = (memory.read_u32(at + 8), memory.read_u16(at + 12), memory.read_u16(at + 14));
            assert_eq!(flags & !(AVAIL | USED | WRITE), 0, "reserved flags of a used descriptor");
            self.used += self.outstanding.remove(&id).expect("an ID that is outstanding");
            assert_eq!(flags & WRITE != 0, len != 0, "WRITE says whether anything was written (virtio 1.2 §2.8.3)");
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

    /// The driver event suppression structure.
    pub(super) fn set_driver_event(&self, off_wrap: u16, flags: u16) {
        let at = self.guest.at(self.driver_area);
        self.guest.memory.write_u16(at, off_wrap);
        self.guest.memory.store_release_u16(at + 2, flags);
    }

    /// The device event suppression structure: place and flags.
    pub(super) fn device_event(&self) -> (u16, u16) {
        let at = self.guest.at(self.device_area);
        let flags = self.guest.memory.load_acquire_u16(at + 2);
        (self.guest.memory.read_u16(at), flags)
    }

    /// Kicks if the device asked for it since `before` descriptors were available (virtio 1.2 §2.8.10).
    pub(super) fn kick_if_needed(&self, before: u64) {
        fence(Ordering::SeqCst);
        let (off_wrap, flags) = self.device_event();
        let asked = match flags {
            ENABLE => true,
            DISABLE => false,
            DESC => {
                assert!(self.event_idx, "not negotiated");
                (before..self.avail).any(|count| self.raw(count) == off_wrap)
            }
            other => panic!("reserved event flags {other}"),
        };
        if asked {
            self.guest.kick();
        }
    }

    /// Waits for `n` used chains on the call eventfd alone, asking for a call only when there is nothing to do.
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
                assert!(wait_readable(&self.guest.call, Duration::from_secs(20)), "a call never came");
            }
            count(&self.guest.call);
            self.set_driver_event(0, DISABLE);
            seen.extend(self.used());
        }
        seen
    }
}
