//! The controller passes to another driver, as to one in another process: both have the same function and address space.

use std::sync::atomic::Ordering::SeqCst;

use super::rig::{Rig, nvme_options, run, small, span};
use crate::driver::{Command, DiskState, Driver, Outcome, Queue};
use crate::hardware::LeftToSuccessor;

const READ: Command = Command::Read { block: 0, count: 1 };

fn works(queue: &mut dyn Queue) {
    assert_eq!(run(queue, READ, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_quiesced_controller_does_no_dma_and_has_no_memory() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(3);
    drop(queues);

    nvme.quiesce().unwrap();

    rig.assert_stopped();
}

#[test]
fn a_controller_that_the_successor_left_running_is_stopped_and_brought_up() {
    for (stuck, resets) in [(false, 0), (true, 1)] {
        let rig = Rig::new(small());
        let (mut nvme, queues) = rig.up(2);
        drop(queues);
        nvme.quiesce().unwrap();
        // The successor is killed: its memory stays mapped.
        let (successor, mut queues) = rig.up(3);
        works(&mut *queues[2]);
        let of_successor = rig.driver_memory();
        std::mem::forget((successor, queues));
        rig.function.faults.stuck_ready.store(stuck, SeqCst);

        nvme.resume().unwrap();

        assert!(!rig.bus_master_is_on(), "stuck: {stuck}");
        assert_eq!(rig.function.faults.resets.load(SeqCst), resets, "stuck: {stuck}");
        assert_eq!(rig.driver_memory(), of_successor, "it is not this driver's to unmap");
        let mut queues = nvme.recover().unwrap();
        assert_eq!(queues.len(), 2);
        works(&mut *queues[1]);
    }
}

#[test]
fn a_driver_that_has_left_does_not_access_the_controller() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    nvme.quiesce().unwrap();
    let (_successor, mut queues) = rig.up(1);
    let written = rig.function.faults.configurations.lock().unwrap().clone();

    Box::new(nvme).leave(&LeftToSuccessor::new());

    assert_eq!(*rig.function.faults.configurations.lock().unwrap(), written);
    works(&mut *queues[0]);
}

#[test]
fn a_successor_continues_with_the_same_disk_and_the_same_write_cache_only() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    nvme.set_write_cache(false).unwrap();
    let state = nvme.disk_state().unwrap();
    nvme.quiesce().unwrap();
    let (mut successor, _queues) = rig.up(1);

    successor.continue_from(&state).unwrap();

    assert_eq!(successor.disk_state().unwrap(), state);
    assert_eq!(state.write_cache, Some(false));
    let others = [
        DiskState { serial: "OTHER".to_owned(), ..state.clone() },
        DiskState { namespace: 2, ..state.clone() },
        DiskState { identifiers: ([1; 16], [0; 8]), ..state.clone() },
        DiskState { block_size: 4096, ..state.clone() },
        DiskState { zone_blocks: 2048, ..state.clone() },
    ];
    for other in others {
        let error = successor.continue_from(&other).unwrap_err().to_string();
        assert!(error.contains("is no longer what it was"), "{error}");
    }
}

#[test]
fn without_a_controller_there_is_nothing_to_hand_over() {
    let rig = Rig::new(small());
    let mut nvme = rig.bring_up(nvme_options(1)).unwrap();
    nvme.release();

    assert_eq!(nvme.disk_state(), None);
    assert!(nvme.quiesce().is_err());
    nvme.resume().unwrap();
}
