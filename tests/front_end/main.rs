//! `front-end SOCKET`: a front-end under the oracle's load. It must not notice what a test does to the program. It never
//! connects again. The test writes lines to its standard input:
//!
//! ```text
//! N      waits until N more requests have completed, and answers "progressed"
//! next copied|same early|late
//!        connects the virtual machine's next front-end to the same socket: with files of its own for the memory, or the same; it
//!        shares them now or when it starts. Answers "waiting"
//! change the first front-end stops, and the next one goes on. Answers "changed"
//! leave  the next front-end leaves. Answers "left"
//! end    waits for those in flight, reads the whole disk, and answers "nothing lost, doubled or reordered; …"
//! ```
//!
//! The answer to each may be "error: …" instead: what was lost, doubled or reordered, or that the server has disconnected. Then
//! it ends.

use std::io::stdin;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use testbed::client::{Error, NextFrontEnd, NextMemory, Region, Shape};
use testbed::kills::Background;

const USAGE: &str = "usage: front-end SOCKET [--packed] [--seed N]";

fn main() -> ExitCode {
    match run() {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String, Error> {
    let (load, path) = start()?;
    let next = Arc::default();
    for order in stdin().lines() {
        let order = order?;
        if order == "end" {
            break;
        }
        let answer = obey(&order, &load, &path, &next)?;
        if load.is_over() {
            break;
        }
        println!("{answer}");
    }
    let gap = load.finish()?;
    Ok(format!("nothing lost, doubled or reordered; longest time between two completions: {} ms", gap.as_millis()))
}

/// The front-end that waits.
type Waiting = Arc<Mutex<Option<NextFrontEnd>>>;

fn obey(order: &str, load: &Background, path: &Path, next: &Waiting) -> Result<&'static str, Error> {
    let words: Vec<_> = order.split(' ').collect();
    let next = Arc::clone(next);
    let take = |next: &Waiting| next.lock().unwrap_or_else(PoisonError::into_inner).take();
    match words[..] {
        ["next", memory @ ("copied" | "same"), when @ ("early" | "late")] => {
            let memory = if memory == "same" { NextMemory::Same } else { NextMemory::Copied };
            let (socket, early) = (UnixStream::connect(path)?, when == "early");
            load.act(move |guest| {
                let prepared = guest.prepare_next(socket, memory, early)?;
                *next.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
                Ok(())
            });
            Ok("waiting")
        }
        ["change"] => {
            load.act(move |guest| guest.change_to(take(&next).ok_or("nobody waits")?));
            Ok("changed")
        }
        ["leave"] => {
            drop(take(&next));
            Ok("left")
        }
        _ => {
            load.progresses(order.parse().map_err(|_| format!("{order:?}: wanted one of the orders, or a number"))?);
            Ok("progressed")
        }
    }
}

fn start() -> Result<(Background, PathBuf), Error> {
    let mut words = std::env::args().skip(1);
    let path = PathBuf::from(words.next().ok_or(USAGE)?);
    let socket = UnixStream::connect(&path)?;
    let mut shape = Shape { queues: 2, depth: 32, bytes: 32 << 10, ..Shape::default() };
    let mut seed = 1;
    while let Some(word) = words.next() {
        match word.as_str() {
            "--packed" => shape.packed = true,
            "--seed" => seed = words.next().ok_or(USAGE)?.parse()?,
            _ => return Err(USAGE.into()),
        }
    }
    Ok((Background::start(socket, shape, Region::Kept, seed)?, path))
}
