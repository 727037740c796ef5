//! The orders in which the control thread, the workers, the watchdog and the device can proceed. Shuttle runs the whole engine in
//! one thread of the kernel and chooses at each lock, message and wait who goes on; a deadlock fails the test. Deadlines pass at
//! any time. Run by `cargo test -p vhost-device-vfio --features shuttle --lib schedules`; about 20 s.
//!
//! Bugs that it finds, each tried: `while_idle` without the driver's lock (the watchdog resets the device that the control thread
//! takes for idle); a paused worker that submits; a removal of memory answered before the last command that uses it; a ring
//! stopped with a request still in flight; a reset that fails requests because a hand-over waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use super::disk::DiskOptions;
use super::rig::*;
use crate::driver::Command;
use crate::engine::{Engine, Options, WatchdogOptions};
use crate::hardware::AddressSpace;
use crate::memory::{MemTable, Region};

/// Schedules tried for each claim.
const SCHEDULES: usize = 1_000;
/// Virtqueues, each with a worker of its own.
const QUEUES: usize = 2;
/// Requests of each virtqueue.
const REQUESTS: usize = 3;
/// Where the requests' buffers are.
const BUFFERS: u64 = 0x100_0000;
/// See [`watchdog`].
const RELEASE: u32 = 2;

/// Runs `scenario` in many orders.
fn in_many_orders(scenario: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    config.stack_size = 256 << 10;
    let scheduler = shuttle::scheduler::RandomScheduler::new(SCHEDULES);
    shuttle::Runner::new(scheduler, config).run(scenario);
}

/// An engine whose device completes commands one by one, when [`Scene::device`] says so.
struct Scene {
    rig: Arc<Rig>,
    drivers: Vec<SplitDriver>,
    /// The memory that the requests read to.
    buffers: Arc<Region>,
    /// Status bytes by block. Each request reads a block of its own.
    statuses: Arc<Vec<u64>>,
    ended: Arc<AtomicBool>,
}

fn scene() -> Scene {
    let disk = DiskOptions { queues: QUEUES, ..DiskOptions::default() };
    let options = Options {
        rings: QUEUES,
        spin: Duration::ZERO,
        drain_timeout: Duration::ZERO,
        watch: WatchdogOptions::default(),
        placement: Default::default(),
    };
    let rig = Arc::new(Rig::with(disk, options));
    rig.disk.hold();
    let buffers = region(BUFFERS, 4096 * (QUEUES * REQUESTS) as u64);
    rig.disk.add(&buffers).unwrap();
    rig.engine.publish(Arc::new(MemTable::new(vec![Arc::clone(&rig.region), Arc::clone(&buffers)]).unwrap()));
    let mut drivers: Vec<_> = (0..QUEUES).map(|index| rig.driver(index, RingOptions::default())).collect();
    let mut statuses = Vec::new();
    for driver in &mut drivers {
        for _ in 0..REQUESTS {
            let block = statuses.len() as u64;
            statuses.push(driver.send(IN, block, &[(BUFFERS + 4096 * block, 512)]).status);
        }
    }
    Scene { rig, drivers, buffers, statuses: Arc::new(statuses), ended: Arc::default() }
}

impl Scene {
    /// Starts the device: it completes a held command now and then. No request has been answered while the device may still
    /// write to its buffer.
    fn device(&self) -> thread::JoinHandle<()> {
        let (rig, statuses, ended) = (Arc::clone(&self.rig), Arc::clone(&self.statuses), Arc::clone(&self.ended));
        thread::spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                complete_one(&rig, &statuses);
                thread::yield_now();
            }
        })
    }

    /// Waits for the answers to all requests: each has exactly one.
    fn finish(mut self, device: thread::JoinHandle<()>) -> Engine {
        for driver in &mut self.drivers {
            let mut heads = Vec::new();
            while heads.len() < REQUESTS {
                heads.extend(driver.used().into_iter().map(|(head, _)| head));
                thread::yield_now();
            }
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), REQUESTS, "each request is answered once");
        }
        self.ended.store(true, Ordering::SeqCst);
        device.join().unwrap();
        for driver in &mut self.drivers {
            assert_eq!(driver.used(), [], "no request is answered twice");
        }
        Arc::into_inner(self.rig).expect("the device's thread has ended").engine
    }
}

fn complete_one(rig: &Rig, statuses: &[u64]) {
    let held = rig.disk.held();
    if held.is_empty() {
        return;
    }
    let index = thread_rng().gen_range(0..held.len());
    if let Command::Read { block, .. } = held[index].command {
        let status = rig.region.memory().read_u8((statuses[block as usize] - BASE) as usize);
        assert_eq!(status, 0xff, "answered while its command is in flight");
    }
    rig.disk.complete(index);
}

/// One of the watchdog's decisions, at a time of the schedule's choice. Only [`RELEASE`] fails requests.
fn watchdog(engine: &Engine, decision: u32) {
    let supervisor = Arc::clone(&engine.supervisor);
    let recoveries = supervisor.recoveries.load(Ordering::SeqCst);
    thread::yield_now();
    match decision {
        0 => supervisor.reset_after_abort(recoveries),
        1 => supervisor.check(recoveries),
        _ => {
            supervisor.release();
            thread::yield_now();
            supervisor.recover();
        }
    }
}

#[test]
fn a_ring_stop_and_the_watchdog_leave_each_request_answered_once() {
    in_many_orders(|| {
        let scene = scene();
        let device = scene.device();
        let (rig, mut setup) = (Arc::clone(&scene.rig), scene.drivers[0].setup(0));
        let control = thread::spawn(move || {
            setup.base = rig.engine.stop_ring(0).unwrap().expect("it was started");
            rig.engine.start_ring(setup).unwrap();
        });

        watchdog(&scene.rig.engine, thread_rng().gen_range(0..=RELEASE));
        control.join().unwrap();

        scene.finish(device).shut_down();
    });
}

#[test]
fn removed_memory_is_used_by_no_command_whatever_the_watchdog_does() {
    in_many_orders(|| {
        let scene = scene();
        let device = scene.device();
        let (rig, buffers) = (Arc::clone(&scene.rig), Arc::clone(&scene.buffers));
        let control = thread::spawn(move || {
            rig.engine.remove_memory(Arc::clone(&rig.table), &[buffers.gpa()]).unwrap();
            assert_eq!(rig.disk.held().len(), 0, "commands in flight");
            // From here on the device panics if it accesses the memory.
            rig.disk.remove(&buffers).unwrap();
        });

        watchdog(&scene.rig.engine, thread_rng().gen_range(0..=RELEASE));
        control.join().unwrap();

        scene.finish(device).shut_down();
    });
}

#[test]
fn an_idle_device_stays_idle_while_the_control_thread_acts_on_it() {
    in_many_orders(|| {
        let scene = scene();
        let device = scene.device();
        let rig = Arc::clone(&scene.rig);
        let control = thread::spawn(move || {
            let state = || (rig.disk.held().len(), rig.disk.recoveries(), rig.disk.is_shut_down());
            let act = || {
                let before = state();
                (0..20).for_each(|_| thread::yield_now());
                (before, state())
            };
            let (before, after) = rig.engine.while_idle(act).unwrap();
            assert_eq!((before.0, before), (0, after), "commands in flight, or a reset");
        });

        watchdog(&scene.rig.engine, thread_rng().gen_range(0..=RELEASE));
        control.join().unwrap();

        scene.finish(device).shut_down();
    });
}

#[test]
fn a_hand_over_that_fails_leaves_each_request_answered_once_and_without_an_error() {
    in_many_orders(|| {
        let scene = scene();
        let device = scene.device();
        let (rig, mut setup) = (Arc::clone(&scene.rig), scene.drivers[0].setup(0));
        let memory = scene.rig.region.memory().clone();
        let statuses = Arc::clone(&scene.statuses);
        let control = thread::spawn(move || {
            // It is busy if the device does not complete everything in time; nothing has changed then.
            let Ok(held) = rig.engine.hold(Duration::ZERO) else { return };
            setup.base = rig.engine.stop_ring(0).unwrap().expect("it was started");
            rig.engine.lend_device().unwrap();
            let state = || (rig.disk.held().len(), rig.disk.recoveries());
            let lent = state();
            (0..20).for_each(|_| thread::yield_now());
            assert_eq!((lent.0, lent), (0, state()), "somebody used the device while it was lent");
            rig.engine.take_device_back(|| ());
            rig.engine.start_ring(setup).unwrap();
            drop(held);
        });

        watchdog(&scene.rig.engine, thread_rng().gen_range(0..RELEASE));
        control.join().unwrap();

        scene.finish(device).shut_down();
        for &status in &*statuses {
            assert_eq!(memory.read_u8((status - BASE) as usize), 0, "no request has failed");
        }
    });
}
