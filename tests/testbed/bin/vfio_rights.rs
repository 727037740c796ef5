//! `vfio-rights PID`: what the VFIO device files that a process holds are worth to it, one line a file.

use std::process::ExitCode;

use rustix::process::Pid;

fn main() -> ExitCode {
    let process = std::env::args().nth(1).and_then(|word| word.parse().ok()).and_then(Pid::from_raw);
    let Some(process) = process else {
        eprintln!("usage: vfio-rights PID");
        return ExitCode::from(2);
    };
    match testbed::rights::of_process(process) {
        Ok(files) => {
            for (path, attempts) in files {
                let worth = attempts.iter().map(|(what, outcome)| match outcome {
                    Ok(()) => format!("{what}=done"),
                    Err(error) => format!("{what}={}", error.raw_os_error().unwrap_or_default()),
                });
                println!("{path} {}", worth.collect::<Vec<_>>().join(" "));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vfio-rights: process {}: {error}", process.as_raw_nonzero());
            ExitCode::FAILURE
        }
    }
}
