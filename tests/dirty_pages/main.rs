//! `dirty-pages [--requests N] [--seed N] [--program PATH]`: the oracle of dirty pages on each kind of ring, N requests in all.
//! Prints a line for each kind, or the page that was written and not marked.

use std::process::ExitCode;

use testbed::client::Error;
use testbed::dirty_pages::{Options, run};

const USAGE: &str = "usage: dirty-pages [--requests N] [--seed N] [--program PATH]";
const KINDS: u32 = 8;

fn main() -> ExitCode {
    match run_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dirty-pages: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_all() -> Result<(), Error> {
    // Cargo puts examples into a directory beside the program.
    let own = std::env::current_exe()?;
    let beside = own.parent().and_then(|directory| directory.parent()).ok_or("no directory")?;
    let (mut program, mut requests, mut seed) = (beside.join("vhost-device-vfio"), 100_000, 1);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--requests" => requests = value.parse()?,
            "--seed" => seed = value.parse()?,
            "--program" => program = value.into(),
            _ => return Err(USAGE.into()),
        }
    }
    for kind in 0..KINDS {
        let options = Options { seed, ..Options::new(program.clone(), requests / u64::from(KINDS), kind) };
        let report = run(&options).map_err(|error| format!("seed {seed}, {:?}: {error}", options.shape))?;
        println!("{:?}: {report}", options.shape);
    }
    Ok(())
}
