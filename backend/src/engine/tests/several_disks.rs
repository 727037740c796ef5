//! A device with two disks, each with an engine and a guest. Both guests have their memory at the same addresses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::disk::{DiskOptions, FakeDisk};
use super::rig::*;
use crate::addr::{Iova, IovaSlice, Span};
use crate::driver::Driver;
use crate::engine::{Engine, Options, WatchdogOptions};
use crate::hardware::AddressSpace;
use crate::memory::{MemTable, Region};
use crate::placement::Choice;

/// Start of a second region of the second guest.
const EXTRA: u64 = 0x1000_0000;

/// Two engines on one device, each with two virtqueues on one worker.
struct Pair {
    engines: Vec<Engine>,
    disk: FakeDisk,
    regions: Vec<Arc<Region>>,
    drivers: Vec<SplitDriver>,
}

impl Pair {
    fn new() -> Self {
        Self::with(DiskOptions { queues: 2, disks: 2, ..DiskOptions::default() }, Duration::from_secs(20))
    }

    fn with(options: DiskOptions, drain_timeout: Duration) -> Self {
        let disk = FakeDisk::new(options);
        let space: Arc<dyn AddressSpace> = Arc::new(disk.clone());
        let options = Options {
            rings: 2,
            spin: Duration::ZERO,
            drain_timeout,
            watch: WatchdogOptions::default(),
            placement: Default::default(),
        };
        let engines = Engine::start_all(Box::new(disk.clone()), &space, options).unwrap();
        // Below the buffers of the fake disk.
        let allowed = Span::new(Iova(0), 1 << 40).unwrap();
        let slices = IovaSlice::divide(&[allowed], 2).unwrap();
        let regions: Vec<_> = slices.iter().map(|slice| region_in(BASE, LEN, *slice)).collect();
        let mut drivers = Vec::new();
        for (engine, region) in engines.iter().zip(&regions) {
            disk.add(region).unwrap();
            engine.publish(table(&[region]));
            let (driver, setup) = SplitDriver::new(region.memory().clone(), 0, RingOptions::default());
            engine.start_ring(setup).unwrap();
            engine.set_enabled(0, true);
            drivers.push(driver);
        }
        Self { engines, disk, regions, drivers }
    }

    /// Sends a read of a block of its own for each disk, and waits until the device has both.
    fn hold_one_of_each(&mut self) -> Vec<SentRequest> {
        self.disk.hold();
        let sent =
            self.drivers.iter_mut().zip(0..).map(|(driver, block)| driver.send(IN, block, &[(DATA, 512)])).collect();
        wait_until("two commands", || self.disk.held().len() == 2);
        sent
    }

    fn serves(&mut self, disk: usize) {
        let driver = &mut self.drivers[disk];
        let sent = driver.send(FLUSH, 0, &[]);
        driver.wait(1);
        assert_eq!(driver.status(sent), 0, "disk {disk}");
    }
}

fn table(regions: &[&Arc<Region>]) -> Arc<MemTable> {
    Arc::new(MemTable::new(regions.iter().map(|region| Arc::clone(region)).collect()).unwrap())
}

#[test]
fn data_of_two_guests_at_one_address_goes_to_the_right_memory() {
    // The second buffer cannot be accessed in place.
    for data in [[(DATA, 512), (DATA + 512, 512)], [(DATA + 1, 511), (DATA + 0x1001, 513)]] {
        let mut pair = Pair::new();
        for (driver, byte) in pair.drivers.iter_mut().zip(1_u8..) {
            let bytes = vec![byte; 513];
            data.iter().for_each(|(at, _)| driver.fill(*at, &bytes));
            driver.send(OUT, 2 * u64::from(byte), &data);
            driver.wait(1);
            data.iter().for_each(|(at, _)| driver.fill(*at, &[0; 513]));
        }
        for (driver, byte) in pair.drivers.iter_mut().zip(1_u8..) {
            driver.send(IN, 2 * u64::from(byte), &data);
            driver.wait(1);
        }
        for (driver, byte) in pair.drivers.iter().zip(1_u8..) {
            for (at, len) in data {
                assert_eq!(driver.bytes(at, len as usize), vec![byte; len as usize], "guest {byte} at {at:#x}");
            }
        }
    }
}

#[test]
fn removed_memory_of_a_guest_is_used_by_none_of_its_commands() {
    let mut pair = Pair::new();
    // Not where the rings and the status bytes are.
    let extra = region_in(EXTRA, 4096, pair.regions[1].slice());
    pair.disk.add(&extra).unwrap();
    pair.engines[1].publish(table(&[&pair.regions[1], &extra]));
    pair.disk.hold();
    for (driver, at) in pair.drivers.iter_mut().zip([DATA, EXTRA]) {
        driver.send(IN, 0, &[(at, 512)]);
    }
    wait_until("two commands", || pair.disk.held().len() == 2);

    std::thread::scope(|scope| {
        let removal = scope.spawn(|| {
            pair.engines[1].remove_memory(table(&[&pair.regions[1]]), &[extra.gpa()]).unwrap();
            assert!(pair.disk.held().iter().all(|command| command.queue == 0), "a command in flight uses it");
        });
        // Enough for a removal that does not wait.
        std::thread::sleep(Duration::from_millis(30));
        let second = pair.disk.held().iter().position(|command| command.queue == 1).unwrap();
        pair.disk.complete(second);
        removal.join().unwrap();
    });

    assert_eq!(pair.disk.held().len(), 1, "the other guest's command goes on");
    pair.disk.resume();
}

#[test]
fn a_bounced_read_ends_in_memory_that_is_being_removed() {
    let mut pair = Pair::new();
    pair.disk.write(512, &[0x77; 512]);
    pair.disk.hold();
    pair.drivers[1].send(IN, 1, &[(DATA + 1, 512)]);
    wait_until("a command", || pair.disk.held().len() == 1);

    std::thread::scope(|scope| {
        let (engine, gpa) = (&pair.engines[1], pair.regions[1].gpa());
        let removal = scope.spawn(move || engine.remove_memory(Arc::default(), &[gpa]));
        std::thread::sleep(Duration::from_millis(30));
        pair.disk.complete(0);
        removal.join().unwrap().unwrap();
    });

    assert_eq!(pair.drivers[1].bytes(DATA + 1, 512), [0x77; 512]);
}

#[test]
fn an_idle_device_has_no_command_of_any_disk() {
    let mut pair = Pair::new();
    let disk = pair.disk.clone();
    disk.hold();
    pair.drivers[1].send(IN, 0, &[(DATA, 512)]);
    wait_until("a command", || disk.held().len() == 1);

    std::thread::scope(|scope| {
        let idle = scope.spawn(|| pair.engines[0].while_idle(|| assert_eq!(disk.held().len(), 0)));
        std::thread::sleep(Duration::from_millis(30));
        disk.resume();
        idle.join().unwrap().unwrap();
    });

    pair.drivers[1].wait(1);
    pair.serves(0);
    pair.serves(1);
}

#[test]
fn two_users_of_the_idle_device_do_not_end_each_others_pause() {
    let Pair { engines, disk, mut drivers, .. } = Pair::new();
    let (ended, disk, engines) = (&AtomicBool::new(false), &disk, &engines);
    disk.hold();

    std::thread::scope(|scope| {
        let users = engines.iter().map(|engine| {
            let act = || {
                (0..5).for_each(|_| {
                    assert_eq!(disk.held().len(), 0, "commands in flight");
                    std::thread::sleep(Duration::from_micros(50));
                });
            };
            scope.spawn(move || (0..50).for_each(|_| engine.while_idle(act).unwrap()))
        });
        let users: Vec<_> = users.collect();
        for driver in &mut drivers {
            scope.spawn(|| {
                while !ended.load(SeqCst) {
                    driver.send(FLUSH, 0, &[]);
                    driver.wait(1);
                }
            });
        }
        let device = scope.spawn(|| {
            while !ended.load(SeqCst) {
                std::thread::sleep(Duration::from_micros(100));
                (0..disk.held().len()).for_each(|_| disk.complete(0));
            }
        });
        let acted: Vec<_> = users.into_iter().map(|user| user.join()).collect();
        ended.store(true, SeqCst);
        device.join().unwrap();
        disk.resume();
        assert!(acted.iter().all(Result::is_ok), "see above");
    });
}

#[test]
fn a_ring_that_does_not_drain_fails_its_own_requests_and_the_others_are_submitted_again() {
    let options = DiskOptions { queues: 2, disks: 2, ..DiskOptions::default() };
    let mut pair = Pair::with(options, Duration::from_millis(50));
    let sent = pair.hold_one_of_each();

    assert_eq!(pair.engines[0].stop_ring(0).unwrap(), Some(1));

    assert_eq!((pair.drivers[0].status(sent[0]), pair.disk.recoveries()), (1, 1));
    wait_until("the other's command again", || pair.disk.held().iter().any(|command| command.queue == 1));
    assert_eq!(pair.drivers[1].used(), [], "not answered meanwhile");
    pair.disk.resume();
    pair.drivers[1].wait(1);
    assert_eq!(pair.drivers[1].status(sent[1]), 0);
    assert_eq!(pair.engines.iter().map(|engine| engine.statistics().resubmitted).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn an_idle_device_that_is_not_idle_in_time_loses_no_request_of_the_other_disk() {
    let options = DiskOptions { queues: 2, disks: 2, ..DiskOptions::default() };
    let mut pair = Pair::with(options, Duration::from_millis(50));
    let sent = pair.hold_one_of_each();

    pair.engines[0].while_idle(|| assert_eq!(pair.disk.held().len(), 0)).unwrap();

    pair.disk.resume();
    pair.drivers.iter_mut().for_each(|driver| assert_eq!(driver.wait(1).len(), 1));
    assert_eq!([0, 1].map(|disk| pair.drivers[disk].status(sent[disk])), [1, 0]);
}

#[test]
fn an_engine_that_ends_leaves_the_other_and_its_recovery() {
    let mut pair = Pair::new();
    pair.engines.remove(0).shut_down();
    assert!(!pair.disk.is_shut_down());
    pair.serves(1);

    let supervisor = Arc::clone(&pair.engines[0].supervisor);
    assert_eq!(supervisor.command_queues().len(), 1, "the workers of the other engine");
    supervisor.reset_after_abort(supervisor.recoveries.load(SeqCst));

    assert_eq!(pair.disk.recoveries(), 1);
    pair.serves(1);
    drop(supervisor);
    pair.engines.remove(0).shut_down();
    assert!(pair.disk.is_shut_down());
}

#[test]
fn the_shared_write_cache_is_on_only_while_no_guest_wants_it_off() {
    let pair = Pair::new();
    let [first, second] = &*pair.engines else { unreachable!("two disks") };

    first.set_write_cache(false).unwrap();
    assert_eq!((first.write_cache(), second.write_cache()), (false, true), "the second sends flushes in any case");
    second.set_write_cache(false).unwrap();
    second.set_write_cache(true).unwrap();
    assert_eq!(pair.disk.cache_switches(), [false, false], "the first still wants it off");
    first.set_write_cache(true).unwrap();

    assert_eq!(pair.disk.cache_switches(), [false, false, true]);
    assert!(first.write_cache() && second.write_cache());
}

#[test]
fn each_disk_needs_a_queue() {
    let disk = FakeDisk::new(DiskOptions { queues: 1, disks: 2, ..DiskOptions::default() });
    let space: Arc<dyn AddressSpace> = Arc::new(disk.clone());
    let options = Options {
        rings: 1,
        spin: Duration::ZERO,
        drain_timeout: Duration::ZERO,
        watch: WatchdogOptions::default(),
        placement: Default::default(),
    };

    let error = Engine::start_all(Box::new(disk.clone()), &space, options).err().unwrap();

    assert!(error.to_string().contains("no queue"), "{error}");
    assert!(disk.is_shut_down());
    assert_eq!(disk.geometries().len(), 2);
}

/// The CPUs need not exist: then the workers stay where they are, and the log says so.
#[test]
fn cpus_are_divided_among_the_workers_of_all_disks() {
    let disk = FakeDisk::new(DiskOptions { queues: 2, disks: 2, ..DiskOptions::default() });
    let space: Arc<dyn AddressSpace> = Arc::new(disk.clone());
    let placement = Choice::List("0-1".parse().unwrap()).placement();
    let (spin, drain_timeout, watch) = (Duration::ZERO, Duration::ZERO, WatchdogOptions::default());
    let options = Options { rings: 1, spin, drain_timeout, watch, placement };

    let engines = Engine::start_all(Box::new(disk), &space, options).unwrap();

    let workers = engines.iter().flat_map(|engine| engine.handle().workers());
    let cpus: Vec<_> = workers.map(|worker| worker.cpus.unwrap().to_string()).collect();
    assert_eq!(cpus, ["0", "1"]);
}
