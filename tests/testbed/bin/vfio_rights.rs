//! `vfio-rights PID`: which access to their devices a process has through the VFIO device files and group files that it holds,
//! one line per file. `vfio-rights PID hold`: duplicates the device files, changes what they allow to change, prints "held" and
//! keeps them until it is killed. `vfio-rights PID hold-group`: keeps the group files, and the device files from groups.

use std::io;
use std::process::ExitCode;

use rustix::process::Pid;
use testbed::holder::Held;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let process = arguments.first().and_then(|word| word.parse().ok()).and_then(Pid::from_raw);
    let done = match (process, arguments.get(1).map(String::as_str)) {
        (Some(process), None) => show(process),
        (Some(process), Some("hold")) => hold(process),
        (Some(process), Some("hold-group")) => hold_group(process),
        _ => {
            eprintln!("usage: vfio-rights PID [hold|hold-group]");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vfio-rights: {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn show(process: Pid) -> io::Result<()> {
    for (path, attempts) in testbed::rights::of_process(process)? {
        let results = attempts.iter().map(|(name, result)| match result {
            Ok(()) => format!("{name}=done"),
            Err(error) => format!("{name}={}", error.raw_os_error().unwrap_or_default()),
        });
        println!("{path} {}", results.collect::<Vec<_>>().join(" "));
    }
    Ok(())
}

fn hold(process: Pid) -> io::Result<()> {
    let held = Held::take_from(process)?;
    println!("held {} file(s)", held.count());
    keep(held)
}

fn hold_group(process: Pid) -> io::Result<()> {
    let held = testbed::rights::group_files_of(process)?;
    println!("held {} file(s)", held.len());
    keep(held)
}

fn keep<T>(_held: T) -> ! {
    loop {
        std::thread::park();
    }
}
