//! An I/O queue of the driver whose controller is simulated by the bench.

use std::hint::black_box;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_vfio::addr::Iova;
use vhost_device_vfio::driver::nvme::prp::Limits;
use vhost_device_vfio::driver::nvme::queue::{
    Doorbells, IoQueue, MAX_DEPTH, QueueInterrupt, QueueMemory, QueueSetup, Tags, completions_at, memory_needed,
};
use vhost_device_vfio::hardware::{CacheFlush, Registers};
use vhost_device_vfio::sys::SharedMemory;
use vm_memory::MmapRegion;

/// Limits of the simulated controller.
pub(crate) const LIMITS: Limits = Limits { block: 512, transfer: 1 << 20 };

/// A BAR that ignores doorbell writes.
struct IgnoredDoorbells;

impl Registers for IgnoredDoorbells {
    fn size(&self) -> usize {
        0x2000
    }
    fn read32(&self, _: usize) -> u32 {
        0
    }
    fn read64(&self, _: usize) -> u64 {
        0
    }
    fn write32(&self, offset: usize, value: u32) {
        black_box((offset, value));
    }
    fn write64(&self, offset: usize, value: u64) {
        black_box((offset, value));
    }
}

/// `bytes` bytes of anonymous memory.
pub(crate) fn shared(bytes: usize) -> SharedMemory {
    SharedMemory::of(Arc::new(MmapRegion::new(bytes).unwrap()))
}

/// A queue of maximum depth and its controller. `caches`, if given, flushes the queue.
#[allow(dead_code, reason = "one bench has doorbells of its own")]
pub(crate) fn pair(caches: Option<Arc<dyn CacheFlush>>) -> (IoQueue, Controller) {
    let memory = shared(memory_needed(MAX_DEPTH));
    (queue(&memory, Arc::new(IgnoredDoorbells), caches), Controller::new(memory))
}

/// A queue of maximum depth with these doorbells.
pub(crate) fn queue(
    memory: &SharedMemory,
    registers: Arc<dyn Registers>,
    caches: Option<Arc<dyn CacheFlush>>,
) -> IoQueue {
    IoQueue::new(QueueSetup {
        name: "bench".to_owned(),
        id: 1,
        depth: MAX_DEPTH,
        memory: QueueMemory { memory: memory.clone(), iova: Iova(0x7000_0000), caches },
        doorbells: Doorbells { registers, stride: 4 },
        namespace: 1,
        disk: 0,
        limits: LIMITS,
        sgl: None,
        interrupt: QueueInterrupt::own(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(), None),
        tags: Tags::Own,
    })
}

/// The controller's side of the queue pair.
pub(crate) struct Controller {
    pub(crate) memory: SharedMemory,
    pub(crate) sq_head: u16,
    pub(crate) cq_tail: u16,
    phase: u16,
}

impl Controller {
    /// Starts at the first entries of the rings in `memory`.
    pub(crate) fn new(memory: SharedMemory) -> Self {
        Self { memory, sq_head: 0, cq_tail: 0, phase: 1 }
    }

    /// Completes the next command. It reads only the command identifier.
    pub(crate) fn complete_one(&mut self) {
        let cid = self.memory.read_u16(usize::from(self.sq_head) * 64 + 2);
        self.sq_head = (self.sq_head + 1) % MAX_DEPTH;
        let at = completions_at(MAX_DEPTH) + usize::from(self.cq_tail) * 16;
        self.memory
            .write_u64(at + 8, u64::from(self.phase) << 48 | u64::from(cid) << 32 | 1 << 16 | u64::from(self.sq_head));
        self.cq_tail += 1;
        if self.cq_tail == MAX_DEPTH {
            (self.cq_tail, self.phase) = (0, 1 - self.phase);
        }
    }
}
