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
    let mut again = Command::new(std::env::current_exe().expect("this program"));
    let output = again.args(["--exact", name, "--nocapture"]).env(VARIABLE, name).output().expect("this program runs");
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{}: {text}", output.status);
    false
}
