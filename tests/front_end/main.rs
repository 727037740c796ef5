//! `front-end SOCKET`: a front-end under the oracle's load. It must not notice what a test does to the program. It never
//! connects again. The test writes lines to its standard input:
//!
//! ```text
//! N      waits until N more requests have completed, and answers "progressed"
//! end    waits for those in flight, reads the whole disk, and answers "nothing lost, doubled or reordered; …"
//! ```
//!
//! The answer to either may be "error: …" instead: what was lost, doubled or reordered, or that the server has disconnected. Then
//! it ends.

use std::io::stdin;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use testbed::client::{Error, Region, Shape};
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
    let load = start()?;
    for order in stdin().lines() {
        let order = order?;
        if order == "end" {
            break;
        }
        load.progresses(order.parse().map_err(|_| format!("{order:?}: wanted a number or \"end\""))?);
        if load.is_over() {
            break;
        }
        println!("progressed");
    }
    let gap = load.finish()?;
    Ok(format!("nothing lost, doubled or reordered; longest time between two completions: {} ms", gap.as_millis()))
}

fn start() -> Result<Background, Error> {
    let mut words = std::env::args().skip(1);
    let socket = UnixStream::connect(words.next().ok_or(USAGE)?)?;
    let mut shape = Shape { queues: 2, depth: 32, bytes: 32 << 10, ..Shape::default() };
    let mut seed = 1;
    while let Some(word) = words.next() {
        match word.as_str() {
            "--packed" => shape.packed = true,
            "--seed" => seed = words.next().ok_or(USAGE)?.parse()?,
            _ => return Err(USAGE.into()),
        }
    }
    Background::start(socket, shape, Region::Kept, seed)
}
