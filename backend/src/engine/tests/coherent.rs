//! The whole data path with a drive whose DMA bypasses the CPU caches, in any sequence of requests, memory hotplug, resets, and
//! a kernel that is out of memory. Neither the CPUs nor the function may see stale bytes, or bytes from before the memory was
//! mapped.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use proptest::prelude::*;

use super::nvme::{Drive, NVM_READ, NVM_WRITE, soak};
use super::rig::*;
use crate::addr::Span;
use crate::emulated::{Commands, Effect, Fault, Mode, Options, StaleLines};
use crate::engine::{Statistics, WatchdogOptions};
use crate::hardware::{AddressSpace, MapError};
use crate::memory::{MemTable, Region};

fn non_coherent(options: Options) -> Options {
    Options { no_snoop: true, snoop_enforced: false, ..options }
}

fn inline() -> Options {
    non_coherent(Options { size: 1 << 20, queues: 1, mode: Mode::Inline, ..Options::default() })
}

/// A hotplugged region, apart from that of the rings. It is mapped in several pieces, of which the last is shorter.
const EXTRA: u64 = 0x1000_0000;
const EXTRA_LEN: u64 = 0x5_3000;
/// The part of the disk that is used, in sectors.
const SECTORS: u64 = 64;

#[derive(Clone, Debug)]
enum Op {
    /// The CPUs write `len` bytes at `at`.
    Fill { at: u64, len: u64, value: u8 },
    /// A request for `sectors` from `sector`. Its data at `at` is split into two buffers after `cut` bytes.
    Request { write: bool, sector: u64, sectors: u64, at: u64, cut: u64 },
    /// Adds the extra region. Removes it first if it is present.
    Plug,
    /// Removes the extra region.
    Unplug,
    /// Removes it while the kernel is out of memory.
    UnplugWithoutMemory { piece: u32 },
    /// The function reads and writes memory that no request and no CPU uses.
    StrayDma { value: u8 },
    /// Loses the next command, so that the controller is reset.
    Reset { write: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let place = 0..EXTRA_LEN - 0x8000;
    let aligned = prop_oneof![Just(1_u64), Just(64), Just(512), Just(4096)];
    let at = (place, aligned).prop_map(|(at, unit)| at / unit * unit);
    prop_oneof![
        4 => (at.clone(), 1..5000_u64, 1..200_u8).prop_map(|(at, len, value)| Op::Fill { at, len, value }),
        8 => (any::<bool>(), 0..SECTORS - 16, 1..16_u64, at, 0..8192_u64)
            .prop_map(|(write, sector, sectors, at, cut)| Op::Request { write, sector, sectors, at, cut }),
        2 => Just(Op::Plug),
        1 => Just(Op::Unplug),
        1 => (1..5_u32).prop_map(|piece| Op::UnplugWithoutMemory { piece }),
        2 => (1..200_u8).prop_map(|value| Op::StrayDma { value }),
        1 => any::<bool>().prop_map(|write| Op::Reset { write }),
    ]
}

/// The drive, a guest, and a model of memory and disk.
struct Harness {
    drive: Drive,
    driver: SplitDriver,
    space: Arc<dyn AddressSpace>,
    extra: Option<Arc<Region>>,
    memory: Vec<u8>,
    disk: Vec<u8>,
}

/// The last page of the extra region is accessed by the function alone.
const STRAY_DMA: u64 = EXTRA_LEN - 0x1000;

impl Harness {
    fn new() -> Self {
        let watch = WatchdogOptions { timeout: Duration::from_millis(20), retry: Duration::from_millis(1) };
        let drive = Drive::with_watchdog(inline(), Duration::ZERO, Duration::from_secs(20), watch);
        let driver = drive.driver(0, RingOptions::default());
        let space = drive.machine.staged_space();
        let disk = vec![0; SECTORS as usize * 512];
        let mut harness = Self { drive, driver, space, extra: None, memory: Vec::new(), disk };
        harness.plug();
        harness
    }

    fn table(&self, with: Option<&Arc<Region>>) -> Arc<MemTable> {
        let regions = std::iter::once(&self.drive.region).chain(with).map(Arc::clone).collect();
        Arc::new(MemTable::new(regions).unwrap())
    }

    fn plug(&mut self) {
        self.unplug();
        let extra = region(EXTRA, EXTRA_LEN);
        self.memory = (0..EXTRA_LEN).map(|n| (n / 11 % 190) as u8).collect();
        extra.memory().copy_from(0, &self.memory);
        self.space.add(&extra).unwrap();
        self.drive.engine.publish(self.table(Some(&extra)));
        self.extra = Some(extra);
    }

    /// Removes the extra region as the vhost-user session does.
    fn unplug(&mut self) {
        let Some(extra) = self.extra.take() else { return };
        self.drive.engine.remove_memory(self.table(None), &[extra.gpa()]).unwrap();
        match self.space.remove(&extra) {
            Err(MapError::DeviceMustBeIdle { .. }) => {
                self.drive.engine.while_idle(|| self.space.remove_while_idle(&extra)).unwrap().unwrap();
            }
            other => other.unwrap(),
        }
        assert!(bytes(&extra) == self.memory, "contents of the removed region");
    }

    /// The region for requests and its start: the extra region, or part of the first.
    fn buffer_region(&self) -> (Arc<Region>, u64) {
        self.extra.as_ref().map_or_else(|| (Arc::clone(&self.drive.region), DATA), |extra| (Arc::clone(extra), EXTRA))
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Fill { at, len, value } => {
                let Some(extra) = &self.extra else { return };
                let fill = vec![value; len as usize];
                extra.memory().copy_from(at as usize, &fill);
                self.memory[at as usize..][..fill.len()].copy_from_slice(&fill);
            }
            Op::Request { write, sector, sectors, at, cut } => self.request(write, sector, sectors, (at, cut)),
            Op::Plug => self.plug(),
            Op::Unplug => self.unplug(),
            Op::UnplugWithoutMemory { piece } => {
                let left = &self.drive.machine.space_faults().unwrap().fail_nth_copy;
                left.store(piece, SeqCst);
                self.unplug();
                self.drive.machine.space_faults().unwrap().fail_nth_copy.store(0, SeqCst);
            }
            Op::StrayDma { value } => self.stray_dma(value),
            Op::Reset { write } => self.reset(write),
        }
    }

    fn request(&mut self, write: bool, sector: u64, sectors: u64, (at, cut): (u64, u64)) {
        let (region, base) = self.buffer_region();
        let len = sectors * 512;
        let cut = cut.clamp(1, len - 1);
        let parts = [(base + at, cut as u32), (base + at + cut, (len - cut) as u32)];
        let on_disk = sector as usize * 512..(sector + sectors) as usize * 512;
        let offset = region.gpa().offset_of(crate::addr::Gpa(base + at)).unwrap() as usize;
        let mut seen = vec![0; len as usize];
        region.memory().copy_to(offset, &mut seen);

        let sent = self.driver.send(if write { OUT } else { IN }, sector, &parts);
        self.driver.wait(1);

        assert_eq!(self.driver.status(sent), 0);
        if write {
            self.disk[on_disk].copy_from_slice(&seen);
        } else {
            region.memory().copy_to(offset, &mut seen);
            assert!(seen == self.disk[on_disk.clone()], "{sectors} sectors from {sector} at {at:#x} cut at {cut}");
            if self.extra.is_some() {
                self.memory[at as usize..][..seen.len()].copy_from_slice(&seen);
            }
        }
    }

    /// The function must see what the CPUs wrote before the map, or what it wrote since; never contents from before.
    fn stray_dma(&mut self, value: u8) {
        if self.extra.is_none() {
            return;
        }
        let (at, iommu) = (STRAY_DMA as usize, self.drive.machine.iommu());
        let place = Span::new(crate::addr::Iova(EXTRA + STRAY_DMA), 0x1000).unwrap().start();
        let mut found = vec![0; 0x1000];
        iommu.read(place, &mut found).unwrap();
        assert!(found == self.memory[at..], "contents as the function sees them");
        found[128..1000].fill(value);
        iommu.write(place, &found).unwrap();
        self.memory[at..].copy_from_slice(&found);
    }

    fn reset(&mut self, write: bool) {
        let before = self.drive.engine.statistics().recoveries;
        let on = Commands { queue: Some(1), opcode: Some(if write { NVM_WRITE } else { NVM_READ }) };
        self.drive.machine.inject(Fault::once(on, Effect::Lose));
        self.request(write, 0, 8, (0x200, 512));
        assert!(self.drive.engine.statistics().recoveries > before);
    }
}

fn bytes(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.memory().len()];
    region.memory().copy_to(0, &mut bytes);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_time: 5_000, ..ProptestConfig::default() })]

    #[test]
    fn no_stale_byte_reaches_either_side_in_any_sequence(ops in proptest::collection::vec(op(), 1..40)) {
        let mut harness = Harness::new();
        ops.iter().for_each(|op| harness.apply(op));
        harness.unplug();
        assert_eq!(harness.drive.machine.stale_lines(), StaleLines::default());
        assert_eq!(harness.drive.machine.iommu().faults(), []);
    }
}

#[test]
fn transfers_of_every_shape_are_correct_without_snooping() {
    for (queues, lba, sgl) in [(1, 512, false), (2, 4096, true)] {
        let options =
            non_coherent(Options { size: 16 << 20, queues, lba, sgl, mode: Mode::Threaded, ..Options::default() });
        let drive = Drive::with_watchdog(
            options,
            Duration::from_micros(20),
            Duration::from_secs(20),
            WatchdogOptions::default(),
        );
        let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();

        std::thread::scope(|scope| {
            for driver in &mut drivers {
                scope.spawn(move || soak(driver, lba.into(), 60));
            }
        });

        let Statistics { errors, recoveries, flushed_bytes, .. } = drive.engine.statistics();
        assert_eq!((errors, recoveries), (0, 0));
        assert_ne!(flushed_bytes, 0);
    }
}

/// A non-coherent drive in inline mode, and a driver for its ring.
fn drive_and_driver() -> (Drive, SplitDriver) {
    let drive = Drive::with_watchdog(inline(), Duration::ZERO, Duration::from_secs(20), WatchdogOptions::default());
    let driver = drive.driver(0, RingOptions::default());
    (drive, driver)
}

/// Writes two blocks from `at` right after the CPUs have filled them, and reads both back over cached data.
fn assert_round_trips(driver: &mut SplitDriver, at: u64) {
    for value in [1, 2] {
        driver.fill(at, &[value; 4096]);
        driver.send(OUT, u64::from(value) * 8, &[(at, 4096)]);
        driver.wait(1);
    }
    for value in [1, 2] {
        driver.fill(at, &[0xee; 4096]);
        driver.send(IN, u64::from(value) * 8, &[(at, 4096)]);
        driver.wait(1);
        assert!(driver.bytes(at, 4096) == [value; 4096], "block of {value}s");
    }
}

#[test]
fn the_device_reads_what_cpus_wrote_and_cpus_read_what_the_device_wrote() {
    let (drive, mut driver) = drive_and_driver();
    assert_round_trips(&mut driver, DATA);
    assert_eq!(drive.engine.statistics().bounced, 0);
}

#[test]
fn bounced_transfers_are_coherent() {
    let (drive, mut driver) = drive_and_driver();
    assert_round_trips(&mut driver, DATA + 1);
    assert_eq!(drive.engine.statistics().bounced, 4);
}

#[test]
fn cpus_may_write_beside_a_buffer_while_the_device_fills_it() {
    let options = Options { latency: Duration::from_secs(1), ..inline() };
    let drive = Drive::with_watchdog(options, Duration::ZERO, Duration::from_secs(20), WatchdogOptions::default());
    let mut driver = drive.driver(0, RingOptions::default());
    driver.fill(DATA, &[7; 4096]);
    driver.send(IN, 0, &[(DATA + 512 + 32, 512)]);
    wait_until("the command", || drive.engine.statistics().doorbells == 1);

    driver.fill(DATA + 512, &[8; 32]);
    drive.machine.advance(Duration::from_secs(1));
    driver.wait(1);

    assert!(driver.bytes(DATA + 512, 32) == [8; 32], "the CPUs' bytes");
    assert!(driver.bytes(DATA + 544, 512) == [0; 512], "the disk's bytes");
}

#[test]
fn a_read_flushes_its_own_bytes_twice_and_a_write_once() {
    let (drive, mut driver) = drive_and_driver();
    let flushed = || drive.engine.statistics().flushed_bytes;
    let mut before = flushed();
    let mut cost = |driver: &mut SplitDriver, kind, at, len| {
        driver.send(kind, 0, &[(at, len)]);
        driver.wait(1);
        let now = flushed();
        now - std::mem::replace(&mut before, now)
    };

    assert_eq!(cost(&mut driver, OUT, DATA, 4096), 4096);
    assert_eq!(cost(&mut driver, IN, DATA, 4096), 2 * 4096);
    assert_eq!(cost(&mut driver, FLUSH, DATA, 0), 0);
}

#[test]
fn requests_flush_nothing_if_snooping_is_enforced() {
    let options = Options { snoop_enforced: true, size: 16 << 20, ..inline() };
    let drive = Drive::with_watchdog(options, Duration::ZERO, Duration::from_secs(20), WatchdogOptions::default());
    let mut driver = drive.driver(0, RingOptions::default());

    soak(&mut driver, 512, 20);

    let Statistics { flushed_bytes, flush_nanoseconds, .. } = drive.engine.statistics();
    let space = drive.machine.staged_space().statistics();
    assert_eq!((flushed_bytes, flush_nanoseconds), (0, 0));
    assert_eq!((space.staged, space.flushed_at_map, space.flushed_at_unmap), (0, 0, 0));
}

#[test]
fn a_request_of_several_commands_is_flushed_completely() {
    let drive = Drive::with_watchdog(
        Options { mdts: 1, ..inline() },
        Duration::ZERO,
        Duration::from_secs(20),
        WatchdogOptions::default(),
    );
    let mut driver = drive.driver(0, RingOptions::default());
    let bytes: Vec<u8> = (0..64_u32 << 10).map(|n| (n / 100 % 200) as u8).collect();
    driver.fill(DATA, &bytes);

    driver.send(OUT, 0, &[(DATA, 64 << 10)]);
    driver.wait(1);
    driver.send(IN, 0, &[(DATA + 0x2_0000, 64 << 10)]);
    driver.wait(1);

    assert!(driver.bytes(DATA + 0x2_0000, 64 << 10) == bytes);
    assert_eq!(drive.machine.traffic().reads, 8, "commands of 8 KiB");
}

#[test]
fn a_paused_device_gets_no_commands_until_it_is_resumed() {
    let (drive, mut driver) = drive_and_driver();
    let kicks = || drive.engine.statistics().kicks;

    let act = || {
        let (reads, before) = (drive.machine.traffic().reads, kicks());
        let sent = driver.send(IN, 0, &[(DATA, 512)]);
        // Between two wake-ups the worker has polled its rings.
        wait_until("two wake-ups", || {
            driver.kick();
            kicks() >= before + 2
        });
        (sent, drive.machine.traffic().reads - reads)
    };
    let (sent, meanwhile) = drive.engine.while_idle(act).unwrap();

    assert_eq!(meanwhile, 0);
    driver.wait(1);
    assert_eq!(driver.status(sent), 0);
}

#[test]
fn a_pause_waits_for_commands_in_flight() {
    let options = Options { latency: Duration::from_secs(3600), ..inline() };
    let drive = Drive::with_watchdog(options, Duration::ZERO, Duration::from_millis(50), WatchdogOptions::default());
    let mut driver = drive.driver(0, RingOptions::default());
    let sent = driver.send(IN, 0, &[(DATA, 512)]);
    wait_until("the command", || drive.engine.statistics().doorbells == 1);

    // The command never completes. Only a reset ends it.
    let recoveries = drive.engine.while_idle(|| drive.engine.statistics().recoveries).unwrap();

    assert_eq!(recoveries, 1);
    driver.wait(1);
    assert_eq!(driver.status(sent), 1);
}
