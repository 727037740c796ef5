//! A guest with one ring and numbered requests. It makes as many available as there is room for, and fails the test if one is
//! used twice. Request n has one descriptor if n is even, else two; or all have three, as the fast path wants them.

use std::collections::HashMap;

use super::super::bare::setup;
use crate::addr::Gpa;
use crate::engine::virtqueue::chain::Chain;
use crate::engine::{Layout, VringSetup};
use crate::sys::SharedMemory;

/// Bytes of guest memory that the ring uses.
pub(super) const BYTES: usize = 0x180;
const DESC: u64 = 0;
const AVAIL: u64 = 0x80;
const USED: u64 = 0x100;
/// The data of request n are here + 16 n. Nobody reads them.
const DATA: u64 = 0x8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const PACKED_AVAIL: u16 = 0x80;
const PACKED_USED: u16 = 0x8000;

/// The request that a chain carries.
pub(super) fn number(chain: &Chain) -> u64 {
    number_at(chain.readable()[0].start())
}

/// The request whose data are here.
pub(super) fn number_at(data: Gpa) -> u64 {
    (data.0 - DATA) / 16
}

#[derive(Clone)]
pub(super) struct Guest {
    layout: Layout,
    size: u64,
    /// True if all requests have three descriptors.
    pub(super) fast: bool,
    memory: SharedMemory,
    /// Requests made available, of `total`.
    pub(super) offered: u64,
    total: u64,
    /// The numbers of used requests, in their order.
    pub(super) used: Vec<u64>,
    /// Split: free descriptors.
    free: Vec<u16>,
    /// By head or buffer ID: number and descriptors.
    outstanding: HashMap<u16, (u64, Vec<u16>)>,
    /// Split: avail.idx and the used index seen. Packed: counts of descriptors.
    avail: u64,
    seen: u64,
}

impl Guest {
    pub(super) fn new((layout, size): (Layout, u16), fast: bool, total: u64, memory: &SharedMemory) -> Self {
        let mut guest = Self {
            layout,
            size: size.into(),
            fast,
            memory: memory.clone(),
            offered: 0,
            total,
            used: Vec::new(),
            free: (0..size).rev().collect(),
            outstanding: HashMap::new(),
            avail: 0,
            seen: 0,
        };
        guest.offer();
        guest
    }

    /// Makes `more` further requests available, as there is room.
    pub(super) fn extend(&mut self, more: u64) {
        self.total += more;
        self.offer();
    }

    /// The parameters to start the ring as QEMU does: at used.idx, or at the base of the first start.
    pub(super) fn setup(&self) -> VringSetup {
        let base = match self.layout {
            Layout::Split => u32::from(self.memory.read_u16(at(USED) + 2)),
            Layout::Packed => Layout::Packed.first_base(),
        };
        let size = u16::try_from(self.size).unwrap();
        VringSetup { base, ..setup(self.layout, size, [DESC, AVAIL, USED]) }
    }

    fn descriptors(&self, number: u64) -> u64 {
        if self.fast { 3 } else { 1 + number % 2 }
    }

    fn room(&self) -> u64 {
        match self.layout {
            Layout::Split => self.free.len() as u64,
            Layout::Packed => {
                let outstanding: u64 = self.outstanding.values().map(|(number, _)| self.descriptors(*number)).sum();
                self.size - outstanding
            }
        }
    }

    fn offer(&mut self) {
        while self.offered < self.total && self.room() >= self.descriptors(self.offered) {
            match self.layout {
                Layout::Split => self.offer_split(self.offered),
                Layout::Packed => self.offer_packed(self.offered),
            }
            self.offered += 1;
        }
    }

    /// Address, length and flags of each descriptor of a request.
    fn parts(&self, number: u64) -> impl Iterator<Item = (u64, u32, u16)> + use<> {
        let count = self.descriptors(number);
        (0..count).map(move |n| {
            let more = if n + 1 < count { NEXT } else { 0 };
            if n == 0 { (DATA + 16 * number, 16, more) } else { (DATA + 0x4000, 1, WRITE | more) }
        })
    }

    fn offer_split(&mut self, number: u64) {
        let slots: Vec<u16> = (0..self.descriptors(number)).map(|_| self.free.pop().unwrap()).collect();
        for (n, (addr, len, flags)) in self.parts(number).enumerate() {
            let desc = at(DESC) + 16 * usize::from(slots[n]);
            self.memory.write_u64(desc, addr);
            self.memory.write_u32(desc + 8, len);
            self.memory.write_u16(desc + 12, flags);
            self.memory.write_u16(desc + 14, slots.get(n + 1).copied().unwrap_or(0));
        }
        self.memory.write_u16(at(AVAIL) + 4 + 2 * self.slot(self.avail), slots[0]);
        self.avail += 1;
        self.memory.write_u16(at(AVAIL) + 2, u16::try_from(self.avail).unwrap());
        assert_eq!(self.outstanding.insert(slots[0], (number, slots)), None);
    }

    fn offer_packed(&mut self, number: u64) {
        let id = u16::try_from(number).unwrap();
        let parts: Vec<_> = self.parts(number).collect();
        for (n, (addr, len, flags)) in (0..).zip(parts).collect::<Vec<_>>().into_iter().rev() {
            let desc = at(DESC) + 16 * self.slot(self.avail + n);
            self.memory.write_u64(desc, addr);
            self.memory.write_u32(desc + 8, len);
            self.memory.write_u16(desc + 12, id);
            let owner = if self.wrap(self.avail + n) { PACKED_AVAIL } else { PACKED_USED };
            self.memory.write_u16(desc + 14, flags | owner);
        }
        self.avail += self.descriptors(number);
        assert_eq!(self.outstanding.insert(id, (number, Vec::new())), None);
    }

    /// Looks for used requests, and makes further ones available.
    pub(super) fn reap(&mut self) {
        while let Some(id) = self.next_used() {
            let (number, slots) = self.outstanding.remove(&id).expect("a request is used that is not outstanding");
            self.free.extend(slots.iter().rev());
            self.seen += if self.layout == Layout::Packed { self.descriptors(number) } else { 1 };
            self.used.push(number);
        }
        self.offer();
    }

    fn next_used(&self) -> Option<u16> {
        match self.layout {
            Layout::Split => {
                let published = u64::from(self.memory.read_u16(at(USED) + 2));
                (published != self.seen)
                    .then(|| self.memory.read_u32(at(USED) + 4 + 8 * self.slot(self.seen)).try_into().unwrap())
            }
            Layout::Packed => {
                let desc = at(DESC) + 16 * self.slot(self.seen);
                let flags = self.memory.read_u16(desc + 14);
                let wrap = self.wrap(self.seen);
                let used = (flags & PACKED_AVAIL != 0) == wrap && (flags & PACKED_USED != 0) == wrap;
                (used && self.seen != self.avail).then(|| self.memory.read_u16(desc + 12))
            }
        }
    }

    fn slot(&self, count: u64) -> usize {
        usize::try_from(count % self.size).unwrap()
    }

    fn wrap(&self, count: u64) -> bool {
        (count / self.size).is_multiple_of(2)
    }
}

fn at(gpa: u64) -> usize {
    usize::try_from(gpa).unwrap()
}
