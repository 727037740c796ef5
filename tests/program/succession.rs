//! A virtual machine changes its front-end while the program stays: the next one connects while the first is served, and goes on
//! where that stops.

use std::os::unix::net::UnixStream;

use testbed::client::{Client, Guest, NextFrontEnd, NextMemory, Region, Shape};
use testbed::kills::Background;

use crate::operator::ctl;
use crate::process::{LIMIT, Process};

const COHERENT: &str = "latency=100us,order=random";
const FLUSHED: &str = "latency=100us,order=random,no-snoop=controllable,snoop-enforced=off";

fn serve(options: &str, more: &[&str]) -> Process {
    let options = format!("size={},{options}", Background::DISK);
    Process::serve_with(&options, &[&["--no-snoop", "allow"], more].concat())
}

fn shape(packed: bool) -> Shape {
    Shape { queues: 2, depth: 32, bytes: 32 << 10, packed, ..Shape::default() }
}

fn socket(process: &Process) -> UnixStream {
    UnixStream::connect(process.path("socket")).unwrap()
}

fn load(process: &Process, packed: bool) -> Background {
    let started = Background::start(socket(process), shape(packed), Region::Kept, 1);
    started.unwrap_or_else(|error| panic!("{error}; its log:\n{}", process.log()))
}

fn finish(load: Background, process: &Process) {
    let gap = load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", process.log()));
    println!("longest time between two completions: {gap:?}");
}

fn ended_well(mut process: Process) -> String {
    let output = process.stop();
    assert!(output.status.success() && output.log.contains(" errors=0 "), "{}", output.log);
    output.log
}

/// The load's guest changes its front-end.
fn change(load: &Background, process: &Process, memory: NextMemory, early: bool) {
    let socket = socket(process);
    let changed = load.act(move |guest| {
        let next = guest.prepare_next(socket, memory, early)?;
        guest.change_to(next)
    });
    assert!(changed, "its log:\n{}", process.log());
}

#[test]
fn a_guest_changes_its_front_end_under_load_and_nothing_is_lost() {
    for (packed, options) in [(false, COHERENT), (true, COHERENT), (false, FLUSHED), (true, FLUSHED)] {
        for (memory, early) in [(NextMemory::Copied, true), (NextMemory::Copied, false), (NextMemory::Same, true)] {
            let process = serve(options, &["--successor"]);
            let load = load(&process, packed);
            load.progresses(300);

            change(&load, &process, memory, early);
            load.progresses(300);

            finish(load, &process);
            let log = ended_well(process);
            assert_eq!(log.matches("has its turn: moved to its memory in").count(), 1, "{log}");
            assert_eq!(log.matches("to the first request completed").count(), 1, "{log}");
            assert!(log.contains("has taken its place; memory unmapped"), "{log}");
        }
    }
}

/// Twenty, or as many as `CHANGES` says.
#[test]
fn twenty_changes_in_a_row_leave_nothing_behind() {
    let count = std::env::var("CHANGES").map_or(20, |count| count.parse().unwrap());
    for (packed, options) in [(false, COHERENT), (true, FLUSHED)] {
        let process = serve(options, &["--successor", "--control", "DIR/control"]);
        let load = load(&process, packed);
        let mut usage = Vec::new();
        for _ in 0..count {
            load.progresses(100);
            change(&load, &process, NextMemory::Copied, true);
            load.progresses(100);
            usage.push(process.descriptors_and_mappings());
        }
        let served = ctl(&process, &["status"]).unwrap()["front_ends_served"].as_u64().unwrap();
        assert!(served > count as u64, "{served}");
        finish(load, &process);
        let (earlier, later) = usage.split_at(count / 2);
        assert!(later.iter().max() <= earlier.iter().max(), "descriptors and mappings: {usage:?}");
        ended_well(process);
    }
}

#[test]
fn a_stranger_is_sent_away_while_a_front_end_is_served() {
    let process = serve(COHERENT, &[]);
    let load = load(&process, false);
    load.progresses(100);

    let refused = Client::connect(&process.path("socket"), shape(false));

    assert!(refused.is_err());
    load.progresses(100);
    finish(load, &process);
    let log = ended_well(process);
    assert!(log.contains("this device is being used by"), "{log}");
    assert!(!log.contains("has its turn"), "{log}");
}

#[test]
fn an_operator_lets_one_front_end_wait_and_no_more() {
    let process = serve(COHERENT, &["--control", "DIR/control"]);
    let load = load(&process, false);

    ctl(&process, &["successor"]).unwrap();
    change(&load, &process, NextMemory::Copied, true);
    load.progresses(100);
    let second = Client::connect(&process.path("socket"), shape(false));
    ctl(&process, &["successor"]).unwrap();
    ctl(&process, &["successor", "--off"]).unwrap();
    let third = Client::connect(&process.path("socket"), shape(false));

    assert!(second.is_err() && third.is_err());
    assert_eq!(ctl(&process, &["status"]).unwrap()["next_front_end"], serde_json::Value::Null);
    finish(load, &process);
    ended_well(process);
}

#[test]
fn a_front_end_that_waits_is_shown_and_a_second_one_is_sent_away() {
    let mut process = serve(COHERENT, &["--successor", "--control", "DIR/control"]);
    let load = load(&process, false);
    let waiting = socket(&process);
    process.wait_until("it waits", |process| process.log().contains("front-end waits for its turn"));

    let second = Client::connect(&process.path("socket"), shape(false));

    assert!(second.is_err());
    assert!(process.log().contains("waits already"), "{}", process.log());
    let next = ctl(&process, &["status"]).unwrap()["next_front_end"].clone();
    assert!(next.as_str().is_some_and(|name| name.contains(&std::process::id().to_string())), "{next}");
    drop(waiting);
    load.progresses(100);
    finish(load, &process);
    ended_well(process);
}

/// A next front-end that goes as far as `step`.
fn next_up_to(guest: &Guest, socket: UnixStream, step: usize) -> Result<Option<NextFrontEnd>, testbed::client::Error> {
    match step {
        0 => Ok(None),
        _ => {
            let mut next = guest.prepare_next(socket, NextMemory::Copied, step >= 2)?;
            if step >= 3 {
                guest.start_too_early(&mut next)?;
            }
            Ok(Some(next))
        }
    }
}

#[test]
fn a_next_front_end_that_leaves_at_any_step_changes_nothing() {
    for options in [COHERENT, FLUSHED] {
        let mut process = serve(options, &["--successor"]);
        let load = load(&process, false);
        for step in 0..=3 {
            load.progresses(100);
            let socket = socket(&process);
            assert!(load.act(move |guest| next_up_to(guest, socket, step).map(drop)), "{}", process.log());
            process
                .wait_until("it has left", |process| process.log().matches("it has not had its turn").count() > step);
            load.progresses(100);
        }
        change(&load, &process, NextMemory::Copied, true);
        load.progresses(100);

        finish(load, &process);
        let log = ended_well(process);
        assert_eq!(log.matches("has its turn").count(), 1, "{log}");
    }
}

#[test]
fn a_front_end_that_does_not_stop_keeps_its_place() {
    let process = serve(COHERENT, &["--successor"]);
    let load = load(&process, false);
    load.progresses(100);
    let (keep, kept) = std::sync::mpsc::channel();
    let connection = socket(&process);
    let set_up = load.act(move |guest| {
        keep.send(next_up_to(guest, connection, 3)?)?;
        Ok(())
    });

    load.progresses(2000);

    assert!(set_up && !process.log().contains("has its turn"), "{}", process.log());
    drop(kept.recv().unwrap());
    load.progresses(100);
    finish(load, &process);
    ended_well(process);
}

#[test]
fn the_next_front_end_goes_on_when_the_first_one_dies() {
    for ready in [true, false] {
        let mut process = serve(COHERENT, &["--successor"]);
        let mut first = process.client();
        first.write(8, &[7; 4096]).unwrap();
        let mut guest = Guest::new(shape(false), Region::None).unwrap();
        let next = if ready {
            guest.connect(socket(&process)).unwrap();
            None
        } else {
            Some(socket(&process))
        };
        process.wait_until("it waits", |process| process.log().contains("front-end waits for its turn"));

        drop(first);

        process.wait_until("it has its turn", |process| process.log().contains("has its turn"));
        if let Some(next) = next {
            guest.connect(next).unwrap();
        }
        let ring = &mut guest.rings[0];
        let slot = ring.submit(testbed::client::Request::Read { sector: 8, bytes: 4096 });
        ring.publish();
        assert_eq!(ring.wait(LIMIT).unwrap().map(|done| (done.slot, done.status)), Some((slot, 0)));
        let mut found = [0; 4096];
        ring.data(slot, &mut found);
        assert!(found == [7; 4096]);
        drop(guest);
        ended_well(process);
    }
}

#[test]
fn the_first_front_end_may_start_again_as_long_as_the_next_one_is_not_ready() {
    let process = serve(COHERENT, &["--successor"]);
    let load = load(&process, false);
    load.progresses(100);
    let connection = socket(&process);
    let restarted = load.act(move |guest| {
        let next = guest.prepare_next(connection, NextMemory::Copied, true)?;
        guest.stop()?;
        guest.start_again()?;
        drop(next);
        Ok(())
    });
    assert!(restarted, "{}", process.log());
    load.progresses(100);

    finish(load, &process);
    let log = ended_well(process);
    assert!(!log.contains("has its turn"), "{log}");
}
