//! For tests that change what all tests of a process share: its limits, its log, its table of watched mappings.

use std::process::Command;

const VARIABLE: &str = "TEST_IN_ITS_OWN_PROCESS";

/// Runs the test `name` once more, in a process of its own, and fails if that fails. True in that process, where the test is
/// to go on.
///
/// # Panics
/// If the test fails, or there is no test of that name.
#[must_use]
pub fn in_own_process(name: &str) -> bool {
    if std::env::var_os(VARIABLE).is_some_and(|value| value == name) {
        return true;
    }
    let output =
        this_program().args(["--exact", name, "--nocapture"]).env(VARIABLE, name).output().expect("this program runs");
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{}: {text}", output.status);
    false
}

/// This program, run the way Cargo has run it: the kernel cannot start a program for another processor.
fn this_program() -> Command {
    let program = std::env::current_exe().expect("this program");
    let runner =
        std::env::var("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER").ok().filter(|_| cfg!(target_arch = "aarch64"));
    let runner = runner.unwrap_or_default();
    let mut words = runner.split_whitespace();
    let Some(emulator) = words.next() else { return Command::new(program) };
    let mut command = Command::new(emulator);
    command.args(words).arg(program);
    command
}
