//! Commands that fail, get lost or complete twice, during initialization and I/O.

use super::rig::{Rig, nvme_options, run, small, span};
use crate::driver::{Command, Completion, Driver, Outcome, Queue};
use crate::emulated::{Commands, Effect, Fault, Status};

const ONE_BLOCK: Command = Command::Read { block: 0, count: 1 };

fn submit(queue: &mut dyn Queue, tag: u32) {
    queue.submit(ONE_BLOCK, &[span(0, 512)], 0, 512, tag).unwrap();
    queue.ring();
}

fn reap(queue: &mut dyn Queue) -> Vec<Completion> {
    let mut done = Vec::new();
    queue.reap(&mut |completion| done.push(completion));
    done
}

fn done(tag: u32) -> Completion {
    Completion { tag, outcome: Outcome::Success, result: 0 }
}

#[test]
fn every_failure_during_initialization_leaves_the_controller_stopped() {
    for effect in [Effect::Status(Status::INTERNAL_ERROR), Effect::Fatal, Effect::Remove] {
        let mut failures = 0;
        for skip in 0.. {
            let rig = Rig::new(small());
            rig.machine.inject(Fault::Command {
                on: Commands { queue: Some(0), opcode: None },
                skip,
                times: 1,
                effect,
            });
            let up = rig.bring_up(nvme_options(2));
            if rig.machine.traffic().admin < skip {
                break;
            }
            rig.machine.clear_faults();
            failures += usize::from(up.is_err());
            if up.is_err() {
                rig.assert_stopped();
            }
            drop(up);
            rig.assert_stopped();
            assert!(rig.bring_up(nvme_options(2)).is_ok(), "after {effect:?} at command {skip}");
        }
        // Three Identify commands, Number of Queues, and two pairs of Create. Get Features (Volatile Write Cache) may fail.
        assert!(failures >= 8, "{failures} failures of {effect:?}");
    }
}

#[test]
fn an_unknown_write_cache_state_is_assumed_to_be_on() {
    let rig = Rig::new(small());
    rig.machine.inject(Fault::once(Commands::admin(0x0a), Effect::Status(Status::INVALID_FIELD)));
    assert!(rig.bring_up(nvme_options(1)).unwrap().geometry().volatile_cache);
}

#[test]
fn a_lost_command_stays_in_flight_until_the_controller_is_recovered() {
    for effect in [Effect::Lose, Effect::WrongPhase, Effect::WrongId(0x7f)] {
        let rig = Rig::new(small());
        let (mut nvme, mut queues) = rig.up(1);
        rig.machine.inject(Fault::once(Commands::of_queue(1), effect));
        submit(&mut *queues[0], 1);

        assert_eq!(reap(&mut *queues[0]), [], "{effect:?}");
        assert_eq!(queues[0].in_flight(), 1);

        drop(queues);
        let mut queues = nvme.recover().unwrap();
        assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
    }
}

#[test]
fn a_duplicate_completion_is_reported_once() {
    let rig = Rig::new(small());
    let (_nvme, mut queues) = rig.up(1);
    rig.machine.inject(Fault::always(Commands::of_queue(1), Effect::Twice));
    for tag in 0..1000 {
        submit(&mut *queues[0], tag);
        assert_eq!(reap(&mut *queues[0]), [done(tag)]);
    }
}

#[test]
fn error_statuses_become_outcomes() {
    let rig = Rig::new(small());
    let (_nvme, mut queues) = rig.up(1);
    let cases = [(Status::INVALID_OPCODE, Outcome::Unsupported), (Status::INTERNAL_ERROR, Outcome::Failed)];
    for (status, outcome) in cases {
        rig.machine.inject(Fault::once(Commands::of_queue(1), Effect::Status(status)));
        assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), outcome);
    }
}

#[test]
fn a_controller_that_fails_or_vanishes_during_io_completes_nothing_and_can_be_shut_down() {
    for effect in [Effect::Fatal, Effect::Remove] {
        let rig = Rig::new(small());
        let (mut nvme, mut queues) = rig.up(1);
        rig.machine.inject(Fault::once(Commands::of_queue(1), effect));
        submit(&mut *queues[0], 1);
        assert_eq!(reap(&mut *queues[0]), []);
        drop(queues);

        nvme.shut_down();

        rig.machine.clear_faults();
        rig.assert_stopped();
    }
}
