//! The whole data path: virtio driver, workers, NVMe driver, and the emulated controller behind its IOMMU.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::rig::*;
use crate::driver::nvme::{Avoid, InterruptPolicy, Nvme, NvmeOptions};
use crate::emulated::{Commands, Effect, Fault, Machine, Mode, Options, Status};
use crate::engine::Engine;
use crate::memory::{MemTable, Region};

/// Opcodes of the NVM command set, NVMe NVM 1.0 §3.2.
pub(super) const NVM_READ: u8 = 2;
pub(super) const NVM_WRITE: u8 = 1;

pub(super) struct Drive {
    pub(super) engine: Engine,
    pub(super) machine: Machine,
    pub(super) region: Arc<Region>,
}

impl Drive {
    fn new(options: Options, spin: Duration, drain_timeout: Duration) -> Self {
        Self::with_watchdog(options, spin, drain_timeout, crate::engine::WatchdogOptions::default())
    }

    pub(super) fn with_watchdog(
        options: Options,
        spin: Duration,
        drain_timeout: Duration,
        watch: crate::engine::WatchdogOptions,
    ) -> Self {
        let placement = Default::default();
        Self::with(options, crate::engine::Options { rings: 4, spin, drain_timeout, watch, placement }, LEN)
    }

    pub(super) fn with(options: Options, engine: crate::engine::Options, memory: u64) -> Self {
        Self::build(options, engine, (memory, Vec::new()), |nvme, _| nvme)
    }

    pub(super) fn avoiding(options: Options, engine: crate::engine::Options, avoid: Vec<Avoid>) -> Self {
        Self::build(options, engine, (LEN, avoid), |nvme, _| nvme)
    }

    /// A drive that can be released to the host, and reacquired while `available`.
    pub(super) fn reacquirable(
        options: Options,
        watch: crate::engine::WatchdogOptions,
        available: &Arc<AtomicBool>,
    ) -> Self {
        let (spin, drain_timeout, placement) = (Duration::ZERO, Duration::from_secs(20), Default::default());
        let engine = crate::engine::Options { rings: 4, spin, drain_timeout, watch, placement };
        let available = Arc::clone(available);
        Self::build(options, engine, (LEN, Vec::new()), |nvme, machine| {
            let function = machine.function();
            nvme.with_reacquire(Box::new(move || {
                anyhow::ensure!(available.load(Ordering::Relaxed), "the host has it");
                Ok(Arc::clone(&function))
            }))
        })
    }

    fn build(
        options: Options,
        engine: crate::engine::Options,
        (memory, avoid): (u64, Vec<Avoid>),
        finish: impl FnOnce(Nvme, &Machine) -> Nvme,
    ) -> Self {
        let queues = options.queues;
        let machine = Machine::new(options).unwrap();
        let wanted =
            NvmeOptions { namespaces: Vec::new(), queues, read_only: false, interrupts: InterruptPolicy::Auto, avoid };
        let space = machine.staged_space();
        let nvme = finish(Nvme::bring_up(machine.function(), Arc::clone(&space), wanted).unwrap(), &machine);
        let engine = Engine::start(Box::new(nvme), &space, engine).unwrap();
        let region = region(BASE, memory);
        space.add(&region).unwrap();
        engine.publish(Arc::new(MemTable::new(vec![Arc::clone(&region)]).unwrap()));
        Self { engine, machine, region }
    }

    pub(super) fn threaded(queues: u16, lba: u32) -> Self {
        let options = Options { size: 16 << 20, queues, lba, mode: Mode::Threaded, ..Options::default() };
        Self::new(options, Duration::from_micros(20), Duration::from_secs(20))
    }

    pub(super) fn driver(&self, index: usize, shape: RingOptions) -> SplitDriver {
        let (driver, setup) = SplitDriver::new(self.region.memory().clone(), index, shape);
        self.engine.start_ring(setup).unwrap();
        self.engine.set_enabled(index, true);
        driver
    }
}

/// A repeatable sequence of numbers (xorshift64).
pub(super) struct Xorshift(pub(super) u64);

impl Xorshift {
    pub(super) fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Splits `len` bytes at `start` into up to four buffers.
fn cut(numbers: &mut Xorshift, start: u64, len: u64) -> Vec<(u64, u32)> {
    let mut parts = Vec::new();
    let (mut at, mut left) = (start, len);
    while left != 0 {
        let part = if parts.len() == 3 { left } else { 1 + numbers.next(left) };
        let part = if numbers.next(2) == 0 { part } else { part.next_multiple_of(512).min(left) };
        parts.push((at, part as u32));
        (at, left) = (at + part, left - part);
    }
    parts
}

/// Sends random reads and writes to the ring's own eighth of the disk, and compares the data with a model.
pub(super) fn soak(driver: &mut SplitDriver, lba: u64, rounds: u64) {
    let area = (1 << 20) + (2 << 20) * driver.index as u64;
    let blocks = 64;
    let mut model = vec![0_u8; (blocks * lba) as usize];
    let mut numbers = Xorshift(0x9e37_79b9 + driver.index as u64);
    let memory = DATA + 0x8_0000 * driver.index as u64;
    for round in 0..rounds {
        let first = numbers.next(blocks);
        let len = (1 + numbers.next((blocks - first).min(16))) * lba;
        let start = memory + numbers.next(4096);
        let start = if numbers.next(2) == 0 { start } else { start & !511 };
        let parts = cut(&mut numbers, start, len);
        let sector = (area + first * lba) / 512;
        let on_disk = (first * lba) as usize..(first * lba + len) as usize;
        if numbers.next(2) == 0 {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + round) as u8).collect();
            driver.fill(start, &bytes);
            model[on_disk].copy_from_slice(&bytes);
            let sent = driver.send(OUT, sector, &parts);
            assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)]);
            assert_eq!(driver.status(sent), 0);
        } else {
            driver.fill(start, &vec![0xee; len as usize]);
            let sent = driver.send(IN, sector, &parts);
            assert_eq!(driver.wait(1), [(u32::from(sent.head), len as u32 + 1)]);
            assert_eq!(driver.status(sent), 0);
            assert!(driver.bytes(start, len as usize) == model[on_disk], "round {round}");
        }
    }
}

#[test]
fn random_reads_and_writes_agree_with_a_model_on_every_ring() {
    for (queues, lba, sgl) in [(1, 512, false), (2, 512, true), (3, 4096, false)] {
        let options = Options { size: 16 << 20, queues, lba, sgl, mode: Mode::Threaded, ..Options::default() };
        let drive = Drive::new(options, Duration::from_micros(20), Duration::from_secs(20));
        let shape = |n| RingOptions { event_idx: n % 2 == 0, ..RingOptions::default() };
        let mut drivers: Vec<_> = (0..4).map(|n| drive.driver(n, shape(n))).collect();

        std::thread::scope(|scope| {
            for driver in &mut drivers {
                scope.spawn(move || soak(driver, lba.into(), 100));
            }
        });

        let statistics = drive.engine.statistics();
        assert_eq!(statistics.reads + statistics.writes, 400);
        assert_eq!((statistics.errors, statistics.recoveries), (0, 0));
        assert_eq!((statistics.sgl != 0, statistics.bounced != 0), (sgl, !sgl), "{statistics}");
        assert_eq!(drive.machine.iommu().faults().len(), 0);
    }
}

/// Supplies of interrupts, best first. The last has none.
fn supplies() -> Vec<Options> {
    let supply = |vectors, msi, intx| Options { vectors, msi, intx, ..Options::default() };
    vec![
        supply(None, 0, false),
        supply(Some(2), 0, false),
        supply(Some(1), 0, false),
        supply(Some(0), 4, false),
        supply(Some(0), 1, false),
        supply(Some(0), 0, true),
        supply(Some(0), 0, false),
    ]
}

#[test]
fn data_is_right_and_events_are_seen_with_every_supply_of_interrupts() {
    for (n, supply) in supplies().into_iter().enumerate() {
        let options = Options { size: 16 << 20, queues: 2, mode: Mode::Threaded, ..supply };
        let drive = Drive::new(options, Duration::ZERO, Duration::from_secs(20));
        let (resized, size) = std::sync::mpsc::channel();
        drive.engine.on_change(move || resized.send(()).unwrap());
        let mut drivers: Vec<_> = (0..4).map(|n| drive.driver(n, RingOptions::default())).collect();

        std::thread::scope(|scope| {
            for driver in &mut drivers {
                scope.spawn(move || soak(driver, 512, 20));
            }
            scope.spawn(|| drive.machine.resize(15 << 20).unwrap());
        });

        size.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("supply {n}: no event"));
        assert_eq!(drive.engine.geometry().blocks, 15 << 11, "supply {n}");
        let statistics = drive.engine.statistics();
        assert_eq!((statistics.errors, statistics.recoveries), (0, 0), "supply {n}");
    }
}

#[test]
fn a_ring_deeper_than_the_device_queue_completes_every_request() {
    let options = Options { size: 16 << 20, queues: 1, queue_entries: 8, mode: Mode::Threaded, ..Options::default() };
    let drive = Drive::new(options, Duration::ZERO, Duration::from_secs(20));
    let mut driver = drive.driver(0, RingOptions { size: 256, event_idx: true, base: 0 });

    for round in 0..20 {
        for n in 0..64 {
            driver.request(IN, 8 * n, &[(DATA + 4096 * n, 4096)]);
        }
        driver.kick();
        assert!(driver.wait(64).iter().all(|&(_, len)| len == 4097), "round {round}");
    }
    assert_eq!(drive.engine.statistics().bytes_read, 20 * 64 * 4096);
}

#[test]
fn get_id_returns_the_controllers_serial_number() {
    let drive = Drive::threaded(1, 512);
    let mut driver = drive.driver(0, RingOptions::default());

    driver.send(GET_ID, 0, &[(DATA, 20)]);
    driver.wait(1);

    assert_eq!(driver.bytes(DATA, 20), *b"EMULATED-0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_failed_command_gets_an_error_status_once() {
    let drive = Drive::threaded(1, 512);
    let mut driver = drive.driver(0, RingOptions::default());
    let status = Status::LBA_OUT_OF_RANGE;
    let reads = Commands { queue: Some(1), opcode: Some(NVM_READ) };
    drive.machine.inject(Fault::once(reads, Effect::Status(status)));

    let failed = driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);
    let good = driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);

    assert_eq!((driver.status(failed), driver.status(good)), (1, 0));
    assert_eq!(drive.engine.statistics().errors, 1);
}

#[test]
fn a_lost_interrupt_only_delays_the_completion() {
    let options = Options { size: 16 << 20, queues: 1, mode: Mode::Threaded, ..Options::default() };
    let drive = Drive::new(options, Duration::ZERO, Duration::from_secs(20));
    let mut driver = drive.driver(0, RingOptions::default());
    drive.machine.inject(Fault::once(Commands::of_queue(1), Effect::LoseInterrupt));

    let sent = driver.send(IN, 0, &[(DATA, 512)]);

    driver.wait(1);
    assert_eq!(driver.status(sent), 0);
}

#[test]
fn a_lost_command_resets_the_controller_and_all_rings_continue() {
    let options = Options { size: 16 << 20, queues: 2, mode: Mode::Threaded, ..Options::default() };
    let drive = Drive::new(options, Duration::ZERO, Duration::from_millis(100));
    let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();
    drive.machine.inject(Fault::once(Commands { queue: Some(1), opcode: Some(NVM_WRITE) }, Effect::Lose));
    let lost = drivers[0].send(OUT, 0, &[(DATA, 512)]);
    std::thread::sleep(Duration::from_millis(50));

    assert_eq!(drive.engine.stop_ring(0).unwrap(), Some(1));

    assert_eq!(drivers[0].wait(1), [(u32::from(lost.head), 1)]);
    assert_eq!(drivers[0].status(lost), 1);
    drive.engine.start_ring(drivers[0].setup(1)).unwrap();
    for driver in &mut drivers {
        let sent = driver.send(IN, 0, &[(DATA, 512)]);
        driver.wait(1);
        assert_eq!(driver.status(sent), 0);
    }
    assert_eq!(drive.engine.statistics().recoveries, 1);
    assert_eq!(drive.machine.iommu().faults().len(), 0);
}

#[test]
fn every_request_fails_after_the_drive_is_unplugged() {
    let options = Options { size: 16 << 20, queues: 1, mode: Mode::Threaded, ..Options::default() };
    let drive = Drive::new(options, Duration::ZERO, Duration::from_millis(100));
    let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();
    drive.machine.inject(Fault::Removed);
    let lost = drivers[0].send(IN, 0, &[(DATA, 512)]);
    std::thread::sleep(Duration::from_millis(50));

    drive.engine.stop_ring(0).unwrap();

    assert_eq!(drivers[0].wait(1), [(u32::from(lost.head), 1)]);
    let refused = drivers[1].send(IN, 0, &[(DATA, 512)]);
    drivers[1].wait(1);
    assert_eq!(drivers[1].status(refused), 1);
}

#[test]
fn nothing_stays_mapped_after_shutdown() {
    let drive = Drive::threaded(2, 512);
    let mut driver = drive.driver(0, RingOptions::default());
    driver.send(OUT, 0, &[(DATA + 1, 512)]);
    driver.wait(1);
    let Drive { engine, machine, region } = drive;

    engine.shut_down();

    machine.space().remove(&region).unwrap();
    assert_eq!(machine.iommu().mapped().len(), 0);
    assert_eq!(machine.iommu().faults().len(), 0);
}

#[test]
fn flushes_reach_the_controller_while_its_write_cache_is_on() {
    let drive = Drive::threaded(2, 512);
    let mut driver = drive.driver(1, RingOptions::default());
    let mut flushes = |expected: u64, why: &str| {
        let sent = driver.send(FLUSH, 0, &[]);
        driver.wait(1);
        assert_eq!(driver.status(sent), 0);
        assert_eq!(drive.machine.traffic().flushes, expected, "{why}");
    };
    flushes(1, "on");

    drive.engine.set_write_cache(false).unwrap();
    flushes(2, "off: one flush for earlier writes");
    drive.engine.set_write_cache(false).unwrap();
    flushes(2, "off already");
    drive.engine.set_write_cache(true).unwrap();
    flushes(3, "on again");
}

#[test]
fn flushes_reach_the_device_if_its_cache_cannot_be_disabled() {
    const SET_FEATURES: u8 = 9;
    let drive = Drive::threaded(1, 512);
    let mut driver = drive.driver(0, RingOptions::default());
    let refusal = Effect::Status(Status::INVALID_FIELD);
    drive.machine.inject(Fault::once(Commands::admin(SET_FEATURES), refusal));

    let error = drive.engine.set_write_cache(false).unwrap_err().to_string();
    assert!(error.starts_with("switch the write cache off: emulated: Set Features"), "{error}");
    drive.machine.inject(Fault::once(Commands { queue: Some(1), opcode: Some(0) }, refusal));
    assert!(drive.engine.set_write_cache(false).is_err(), "the flush of earlier writes has failed");

    assert!(drive.engine.write_cache());
    driver.send(FLUSH, 0, &[]);
    driver.wait(1);
    assert_eq!(drive.machine.traffic().flushes, 1);
}

#[test]
fn a_request_of_several_commands_is_completed_once_whatever_their_outcomes() {
    let options =
        Options { size: 16 << 20, queues: 1, mdts: 1, queue_entries: 8, mode: Mode::Threaded, ..Options::default() };
    let drive = Drive::new(options, Duration::ZERO, Duration::from_secs(20));
    let mut driver = drive.driver(0, RingOptions::default());

    let whole = driver.send(IN, 0, &[(DATA, 1 << 20)]);
    assert_eq!(driver.wait(1), [(u32::from(whole.head), (1 << 20) + 1)]);
    assert_eq!(drive.machine.traffic().reads, 128, "commands of 8 KiB");

    let on = Commands { queue: Some(1), opcode: Some(NVM_READ) };
    let effect = Effect::Status(Status::LBA_OUT_OF_RANGE);
    drive.machine.inject(Fault::Command { on, skip: 60, times: 3, effect });
    let failed = driver.send(IN, 0, &[(DATA, 1 << 20)]);
    assert_eq!(driver.wait(1), [(u32::from(failed.head), 1)]);
    drive.machine.clear_faults();
    let good = driver.send(IN, 0, &[(DATA, 512)]);
    assert_eq!(driver.wait(1), [(u32::from(good.head), 513)], "and no other used entry in between");
    assert_eq!((driver.status(whole), driver.status(failed), driver.status(good)), (0, 1, 0));
}

#[test]
fn only_a_sleeping_worker_is_interrupted() {
    let options = Options { size: 16 << 20, queues: 1, mode: Mode::Threaded, ..Options::default() };
    for (spin, interrupts) in [(Duration::from_secs(3600), 0), (Duration::ZERO, 1)] {
        let options = Options { latency: Duration::from_millis(50), ..options.clone() };
        let drive = Drive::new(options, spin, Duration::from_secs(20));
        let mut driver = drive.driver(0, RingOptions::default());
        let before = drive.machine.traffic().interrupts;

        let sent = driver.send(IN, 0, &[(DATA, 512)]);
        driver.wait(1);

        assert_eq!((driver.status(sent), drive.machine.traffic().interrupts - before), (0, interrupts), "{spin:?}");
    }
}
