//! Test fixture: an emulated machine with a drive, guest memory, and the parts of the engine that use a queue.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::MmapRegion;

use crate::addr::{Iova, Span};
use crate::driver::nvme::{InterruptPolicy, Nvme, NvmeError, NvmeOptions};
use crate::driver::{Command, Completion, Driver, Outcome, Queue};
use crate::emulated::{Machine, Options};
use crate::hardware::{DmaBuffer, Function, InterruptKind, Registers};
use crate::sys::{Poller, SharedMemory};

/// Start of guest memory.
pub(super) const GUEST: Iova = Iova(0x10_0000);
pub(super) const GUEST_BYTES: usize = 4 << 20;

pub(super) fn small() -> Options {
    Options { size: 8 << 20, ..Options::default() }
}

pub(super) fn nvme_options(queues: u16) -> NvmeOptions {
    NvmeOptions {
        namespaces: Vec::new(),
        queues,
        read_only: false,
        interrupts: InterruptPolicy::Auto,
        avoid: Vec::new(),
    }
}

pub(super) fn span(offset: u64, len: u64) -> Span<Iova> {
    Span::new(Iova(GUEST.0 + offset), len).unwrap()
}

/// An emulated machine whose function is wrapped to inject faults.
pub(super) struct Rig {
    pub(super) machine: Machine,
    pub(super) function: Arc<FaultyFunction>,
    pub(super) guest: SharedMemory,
    /// Size of a logical block, bytes.
    pub(super) lba: u32,
}

impl Rig {
    pub(super) fn new(options: Options) -> Self {
        let lba = options.lba;
        let machine = Machine::new(options).unwrap();
        let guest = SharedMemory::of(Arc::new(MmapRegion::new(GUEST_BYTES).unwrap()));
        machine.iommu().map(span(0, GUEST_BYTES as u64), guest.clone()).unwrap();
        let function = Arc::new(FaultyFunction {
            inner: machine.function(),
            faults: Arc::default(),
            class: None,
            free_vectors: usize::MAX,
        });
        Self { machine, function, guest, lba }
    }

    pub(super) fn with_function(options: Options, change: impl FnOnce(&mut FaultyFunction)) -> Self {
        let mut rig = Self::new(options);
        change(Arc::get_mut(&mut rig.function).unwrap());
        rig
    }

    pub(super) fn bring_up(&self, options: NvmeOptions) -> Result<Nvme, NvmeError> {
        Nvme::bring_up(Arc::clone(&self.function) as Arc<dyn Function>, self.machine.space(), options)
    }

    pub(super) fn up(&self, queues: u16) -> (Nvme, Vec<Box<dyn Queue>>) {
        let mut nvme = self.bring_up(nvme_options(queues)).unwrap();
        let queues = nvme.take_queues();
        (nvme, queues)
    }

    /// Number of mappings that belong to the driver.
    pub(super) fn driver_memory(&self) -> usize {
        self.machine.iommu().mapped().len() - 1
    }

    pub(super) fn bus_master_is_on(&self) -> bool {
        let mut command = [0; 2];
        self.machine.function().config_read(4, &mut command).unwrap();
        command[0] & 4 != 0
    }

    pub(super) fn bounce(&self, bytes: usize) -> DmaBuffer {
        self.machine.space().buffer(bytes).unwrap()
    }

    /// Asserts the state after every stop: no DMA is possible, and the driver's memory is unmapped.
    pub(super) fn assert_stopped(&self) {
        assert!(!self.bus_master_is_on(), "bus mastering is off");
        assert_eq!(self.driver_memory(), 0, "the driver's memory is unmapped");
        assert_eq!(self.machine.iommu().faults(), [], "no DMA to unmapped addresses");
    }
}

/// Faults of the function, switched on and off while the driver runs.
#[derive(Default)]
pub(super) struct InjectedFaults {
    /// CSTS.RDY reads as 1 until the function is reset.
    pub(super) stuck_ready: AtomicBool,
    /// Every register reads as all ones.
    pub(super) gone: AtomicBool,
    pub(super) fatal: AtomicBool,
    pub(super) reset_fails: AtomicBool,
    pub(super) bus_master_stays: AtomicBool,
    /// The function has vectors for one I/O queue only.
    pub(super) fewer_vectors: AtomicBool,
    pub(super) resets: AtomicUsize,
    /// Values written to CC, in order.
    pub(super) configurations: Mutex<Vec<u32>>,
}

/// The emulated function with injected faults.
pub(super) struct FaultyFunction {
    inner: Arc<dyn Function>,
    pub(super) faults: Arc<InjectedFaults>,
    pub(super) class: Option<[u8; 3]>,
    /// Most vectors that the host has free for it.
    pub(super) free_vectors: usize,
}

struct FaultyRegisters {
    inner: Arc<dyn Registers>,
    faults: Arc<InjectedFaults>,
}

impl Function for FaultyFunction {
    fn name(&self) -> &str {
        "0000:00:04.0"
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        match (offset, self.class) {
            (9, Some(class)) => {
                bytes.copy_from_slice(&class);
                Ok(())
            }
            _ => self.inner.config_read(offset, bytes),
        }
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.inner.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        let inner = self.inner.registers(bar)?;
        Ok(Arc::new(FaultyRegisters { inner, faults: Arc::clone(&self.faults) }))
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        if self.faults.fewer_vectors.load(SeqCst) && kind == InterruptKind::MsiX {
            return 2;
        }
        self.inner.vectors(kind)
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        if events.len() > self.free_vectors {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.inner.route_vectors(kind, events)
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.inner.unmask_intx()
    }
    fn interrupt_wanted(&self, vector: u16) -> Option<Arc<AtomicBool>> {
        self.inner.interrupt_wanted(vector)
    }
    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.inner.route_removal(event)
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        if !on && self.faults.bus_master_stays.load(SeqCst) {
            return Err(io::Error::from_raw_os_error(5));
        }
        self.inner.set_bus_master(on)
    }
    fn reset(&self) -> io::Result<()> {
        self.faults.resets.fetch_add(1, SeqCst);
        if self.faults.reset_fails.load(SeqCst) {
            return Err(io::Error::from_raw_os_error(25));
        }
        self.faults.stuck_ready.store(false, SeqCst);
        self.faults.fatal.store(false, SeqCst);
        self.inner.reset()
    }
}

impl Registers for FaultyRegisters {
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn read32(&self, offset: usize) -> u32 {
        let on = |fault: &AtomicBool| fault.load(SeqCst);
        let mut value = self.inner.read32(offset);
        if offset == 0x1c {
            value |= u32::from(on(&self.faults.stuck_ready)) | u32::from(on(&self.faults.fatal)) << 1;
        }
        if on(&self.faults.gone) { u32::MAX } else { value }
    }
    fn read64(&self, offset: usize) -> u64 {
        if self.faults.gone.load(SeqCst) { u64::MAX } else { self.inner.read64(offset) }
    }
    fn write32(&self, offset: usize, value: u32) {
        if offset == 0x14 {
            self.faults.configurations.lock().unwrap().push(value);
        }
        if !self.faults.gone.load(SeqCst) {
            self.inner.write32(offset, value);
        }
    }
    fn write64(&self, offset: usize, value: u64) {
        if !self.faults.gone.load(SeqCst) {
            self.inner.write64(offset, value);
        }
    }
}

/// Registers with doorbells only; each write calls the closure.
pub(in crate::driver::nvme) struct Doorbell<F>(pub(in crate::driver::nvme) F);

impl<F: Fn(usize, u32) + Send + Sync> Registers for Doorbell<F> {
    fn size(&self) -> usize {
        0x2000
    }
    fn read32(&self, _: usize) -> u32 {
        unreachable!("queues do not read registers")
    }
    fn read64(&self, _: usize) -> u64 {
        unreachable!("queues do not read registers")
    }
    fn write32(&self, offset: usize, value: u32) {
        self.0(offset, value);
    }
    fn write64(&self, _: usize, _: u64) {
        unreachable!("doorbells have 32 bits")
    }
}

/// Reaps until `count` commands have completed; waits for the queue's event in between, as a worker does.
pub(super) fn collect(queue: &mut dyn Queue, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    let mut poller = Poller::new().unwrap();
    poller.add(queue.event(), 0).unwrap();
    loop {
        queue.reap(&mut |completion| done.push(completion));
        if done.len() >= count {
            return done;
        }
        assert_eq!(poller.wait(Some(Duration::from_secs(10)), |_| ()).unwrap(), 1, "no event for {done:?}");
        let _ = rustix::io::read(queue.event(), &mut [0; 8]);
    }
}

/// Submits one command and waits for its completion.
pub(super) fn run(queue: &mut dyn Queue, command: Command, buffers: &[Span<Iova>], bytes: u32) -> Outcome {
    queue.submit(command, buffers, 0, bytes, 7).unwrap();
    queue.ring();
    collect(queue, 1)[0].outcome
}

/// Transfers all of `buffers` to or from the medium, one command per extent. Returns the numbers of direct and of bounced
/// commands.
pub(super) fn transfer(
    rig: &Rig,
    queue: &mut dyn Queue,
    write: bool,
    block: u64,
    buffers: &[Span<Iova>],
) -> [usize; 2] {
    let total: u64 = buffers.iter().map(Span::len).sum();
    let bounce = rig.bounce(16384);
    let mut counts = [0, 0];
    let mut position = 0;
    while position < total {
        let extent = queue.extent(buffers, position, 16384);
        let (block, count) = (block + position / u64::from(rig.lba), extent.bytes / rig.lba);
        let command = if write { Command::Write { block, count } } else { Command::Read { block, count } };
        let outcome = if extent.direct {
            queue.submit(command, buffers, position, extent.bytes, 1).unwrap();
            queue.ring();
            collect(queue, 1)[0].outcome
        } else {
            let offsets = offsets(buffers, position, extent.bytes);
            let copy = |into_bounce: bool| {
                for (at, offset) in offsets.iter().enumerate() {
                    match into_bounce {
                        true => bounce.memory().write_u8(at, rig.guest.read_u8(*offset)),
                        false => rig.guest.write_u8(*offset, bounce.memory().read_u8(at)),
                    }
                }
            };
            copy(true);
            let outcome = run(queue, command, &[bounce.span()], extent.bytes);
            copy(false);
            outcome
        };
        assert_eq!(outcome, Outcome::Success);
        counts[usize::from(!extent.direct)] += 1;
        position += u64::from(extent.bytes);
    }
    counts
}

/// The offset in guest memory of each byte of the buffers.
pub(super) fn offsets(buffers: &[Span<Iova>], position: u64, bytes: u32) -> Vec<usize> {
    let all = buffers.iter().flat_map(|buffer| (0..buffer.len()).map(|i| buffer.start().0 - GUEST.0 + i));
    all.skip(position as usize).take(bytes as usize).map(|offset| offset as usize).collect()
}
