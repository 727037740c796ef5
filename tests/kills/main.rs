//! `kills --count N`: kills the program under load N times and restarts it. Prints one line of `name=value` pairs, or what was
//! lost, doubled or reordered. Times are min/median/max.

use std::process::ExitCode;
use std::time::Duration;

use testbed::client::{Error, Region};
use testbed::kills::{Options, run};

const USAGE: &str = "usage: kills [--count N] [--queues N] [--depth N] [--packed] [--linked] [--no-event-idx] [--no-region] \
    [--seed N] [--latency-us N] [--patience-ms N] [--program PATH] [-- ARGUMENT…]";

fn main() -> ExitCode {
    match parse_options().and_then(|options| run(&options)) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kills: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse_options() -> Result<Options, Error> {
    // Cargo puts examples into a directory beside the program.
    let own = std::env::current_exe()?;
    let beside = own.parent().and_then(|directory| directory.parent()).ok_or("no directory")?;
    let mut options = Options::new(beside.join("vhost-device-vfio"), 100, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(USAGE);
        match word.as_str() {
            "--count" => options.kills = value()?.parse()?,
            "--queues" => options.shape.queues = value()?.parse()?,
            "--depth" => options.shape.depth = value()?.parse()?,
            "--packed" => options.shape.packed = true,
            "--linked" => options.shape.indirect = false,
            "--no-event-idx" => options.shape.event_idx = false,
            "--no-region" => options.region = Region::None,
            "--seed" => options.seed = value()?.parse()?,
            "--latency-us" => options.latency = Duration::from_micros(value()?.parse()?),
            "--patience-ms" => options.patience = Duration::from_millis(value()?.parse()?),
            "--program" => options.program = value()?.into(),
            "--" => options.arguments = words.by_ref().collect(),
            _ => return Err(USAGE.into()),
        }
    }
    Ok(options)
}
