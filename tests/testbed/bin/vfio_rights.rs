//! `vfio-rights PID`: which access to their devices a process has through the VFIO device files that it holds, one line per
//! file.

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
                let results = attempts.iter().map(|(name, result)| match result {
                    Ok(()) => format!("{name}=done"),
                    Err(error) => format!("{name}={}", error.raw_os_error().unwrap_or_default()),
                });
                println!("{path} {}", results.collect::<Vec<_>>().join(" "));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vfio-rights: process {}: {error}", process.as_raw_nonzero());
            ExitCode::FAILURE
        }
    }
}
