//! A minimal driver. It builds entries byte by byte from the figures of the specification, and shares no code with the
//! controller.

use std::sync::Arc;

use crate::addr::{Address, Iova};
use crate::emulated::{Machine, Mode, Options};
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, Function, Registers};

pub(super) const CC: usize = 0x14;
pub(super) const CSTS: usize = 0x1c;
pub(super) const CC_ON: u32 = 1 | 6 << 16 | 4 << 20;
const ADMIN_ENTRIES: u32 = 16;

/// A completion queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    pub(super) result: u32,
    pub(super) sq_head: u16,
    pub(super) sq: u16,
    pub(super) cid: u16,
    /// Status code type and code, without Do Not Retry: 0x080 is LBA Out of Range.
    pub(super) status: u16,
}

pub(super) struct Pair {
    pub(super) id: u16,
    sq_entries: u32,
    cq_entries: u32,
    pub(super) sq: DmaBuffer,
    pub(super) cq: DmaBuffer,
    tail: u32,
    head: u32,
    phase: bool,
    next_cid: u16,
}

/// A command being built.
pub(super) struct Sqe(pub(super) [u8; 64]);

impl Sqe {
    pub(super) fn new(opcode: u8) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = opcode;
        Self(bytes)
    }
    pub(super) fn dword(mut self, n: usize, value: u32) -> Self {
        self.0[n * 4..n * 4 + 4].copy_from_slice(&value.to_le_bytes());
        self
    }
    pub(super) fn nsid(self, value: u32) -> Self {
        self.dword(1, value)
    }
    pub(super) fn prps(mut self, prp1: Iova, prp2: Iova) -> Self {
        self.0[24..32].copy_from_slice(&prp1.raw().to_le_bytes());
        self.0[32..40].copy_from_slice(&prp2.raw().to_le_bytes());
        self
    }
    /// Read (2) or write (1) `count` blocks from `lba`.
    pub(super) fn rw(opcode: u8, lba: u64, count: u32) -> Self {
        let mut this = Self::new(opcode).nsid(1).dword(12, count - 1);
        this.0[40..48].copy_from_slice(&lba.to_le_bytes());
        this
    }
}

pub(super) struct Host {
    pub(super) machine: Machine,
    pub(super) function: Arc<dyn Function>,
    pub(super) space: Arc<dyn AddressSpace>,
    pub(super) bar: Arc<dyn Registers>,
    pub(super) admin: Pair,
    /// Flushes the host's queues if the function bypasses the caches.
    pub(super) cache: Option<Arc<dyn CacheFlush>>,
    stride: usize,
}

pub(super) fn small() -> Options {
    Options { size: 1 << 20, ..Options::default() }
}

impl Host {
    /// A host with admin queue memory. The controller is still disabled.
    pub(super) fn disabled(options: Options) -> Self {
        let machine = Machine::new(options).unwrap();
        let (function, space, cache) = (machine.function(), machine.staged_space(), machine.cache());
        let bar = function.registers(0).unwrap();
        let stride = 4 << (bar.read64(0) >> 32 & 0xf);
        let admin = Pair::new(&*space, 0, [ADMIN_ENTRIES; 2]);
        Self { machine, function, space, bar, admin, cache, stride }
    }

    /// A host whose controller is enabled and ready.
    pub(super) fn enabled(options: Options) -> Self {
        let mut host = Self::disabled(options);
        host.function.set_bus_master(true).unwrap();
        host.enable();
        host
    }

    /// Sets up the admin queue, enables the controller and waits until it is ready.
    pub(super) fn enable(&mut self) {
        self.admin = Pair::new(&*self.space, 0, [ADMIN_ENTRIES; 2]);
        self.bar.write32(0x24, (ADMIN_ENTRIES - 1) << 16 | (ADMIN_ENTRIES - 1));
        self.bar.write64(0x28, self.admin.sq.span().start().raw());
        self.bar.write64(0x30, self.admin.cq.span().start().raw());
        self.bar.write32(CC, CC_ON);
        self.wait_csts(|csts| csts & 1 != 0);
    }

    pub(super) fn wait_csts(&self, good: impl Fn(u32) -> bool) {
        while !good(self.bar.read32(CSTS)) {
            std::thread::yield_now();
        }
    }

    pub(super) fn buffer(&self, bytes: usize) -> DmaBuffer {
        self.space.buffer(bytes).unwrap()
    }

    pub(super) fn doorbell(&self, index: usize) -> usize {
        0x1000 + index * self.stride
    }

    /// Writes a submission queue entry without ringing the doorbell.
    pub(super) fn push(&self, pair: &mut Pair, mut sqe: Sqe) -> u16 {
        let cid = pair.next_cid;
        pair.next_cid += 1;
        sqe.0[2..4].copy_from_slice(&cid.to_le_bytes());
        pair.sq.memory().copy_from(pair.tail as usize * 64, &sqe.0);
        self.flush(&pair.sq, pair.tail as usize * 64, 64);
        pair.tail = (pair.tail + 1) % pair.sq_entries;
        cid
    }

    pub(super) fn ring(&self, pair: &Pair) {
        self.bar.write32(self.doorbell(2 * usize::from(pair.id)), pair.tail);
    }

    pub(super) fn flush(&self, buffer: &DmaBuffer, offset: usize, len: usize) {
        if let Some(cache) = &self.cache {
            cache.flush(buffer.memory(), offset, len);
        }
    }

    /// Takes the next completion, if any, and writes the head doorbell.
    pub(super) fn take(&self, pair: &mut Pair) -> Option<Completion> {
        self.flush(&pair.cq, pair.head as usize * 16, 16);
        let done = pair.peek()?;
        pair.head = (pair.head + 1) % pair.cq_entries;
        if pair.head == 0 {
            pair.phase = !pair.phase;
        }
        self.bar.write32(self.doorbell(2 * usize::from(pair.id) + 1), pair.head);
        Some(done)
    }

    /// Runs one command and waits for its completion.
    pub(super) fn run(&self, pair: &mut Pair, sqe: Sqe) -> Completion {
        let cid = self.push(pair, sqe);
        self.ring(pair);
        loop {
            if let Some(done) = self.take(pair) {
                assert_eq!(done.cid, cid);
                return done;
            }
            std::thread::yield_now();
        }
    }

    pub(super) fn admin(&mut self, sqe: Sqe) -> Completion {
        let mut admin = std::mem::replace(&mut self.admin, Pair::empty(&*self.space));
        let done = self.run(&mut admin, sqe);
        self.admin = admin;
        done
    }

    /// Creates an I/O queue pair with vector `id`. `entries` are those of the submission and the completion queue.
    pub(super) fn pair(&mut self, id: u16, entries: [u32; 2]) -> Pair {
        let pair = Pair::new(&*self.space, id, entries);
        let size = |entries: u32| (entries - 1) << 16 | u32::from(id);
        let base = |buffer: &DmaBuffer| buffer.span().start();
        let cq =
            Sqe::new(5).prps(base(&pair.cq), Iova(0)).dword(10, size(entries[1])).dword(11, u32::from(id) << 16 | 0b11);
        assert_eq!(self.admin(cq).status, 0);
        let sq =
            Sqe::new(1).prps(base(&pair.sq), Iova(0)).dword(10, size(entries[0])).dword(11, u32::from(id) << 16 | 1);
        assert_eq!(self.admin(sq).status, 0);
        pair
    }
}

impl Pair {
    pub(super) fn new(space: &dyn AddressSpace, id: u16, [sq_entries, cq_entries]: [u32; 2]) -> Self {
        let sq = space.buffer(sq_entries as usize * 64).unwrap();
        let cq = space.buffer(cq_entries as usize * 16).unwrap();
        Self { id, sq_entries, cq_entries, sq, cq, tail: 0, head: 0, phase: true, next_cid: 0 }
    }

    fn empty(space: &dyn AddressSpace) -> Self {
        Self::new(space, 0, [2; 2])
    }

    /// The completion at the head, if its phase shows that it is new.
    pub(super) fn peek(&self) -> Option<Completion> {
        let (cq, at) = (self.cq.memory(), self.head as usize * 16);
        let status = cq.load_acquire_u16(at + 14);
        if (status & 1 != 0) != self.phase {
            return None;
        }
        Some(Completion {
            result: cq.read_u32(at),
            sq_head: cq.read_u16(at + 8),
            sq: cq.read_u16(at + 10),
            cid: cq.read_u16(at + 12),
            status: status >> 1 & 0x7ff,
        })
    }
}

pub(super) fn threaded() -> Options {
    Options { mode: Mode::Threaded, ..small() }
}
