//! `doctor`: goes through what a first run needs, and says of each thing whether it is there, and if not, how to get it. Nothing
//! stays changed: a function bound to vfio-pci is acquired and released, as by `inspect`; everything else is only read.
//!
//! `doctor --json` prints one object: `schema` (1), `passed` (boolean), and `checks`, a list of objects with `check`, `outcome`
//! (`ok`, `note`, `problem`), `found` and `fix` (text or null). It changes as that of `inspect` does.

mod function;
mod host;
mod qemu;

use std::fmt;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::vfio::PciAddress;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It works without, or it cannot be found out.
    Note,
    /// Serving a function would fail.
    Problem,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, as a short name.
    pub check: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Ok, found: found.into(), fix: None }
    }

    fn note(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Note, found: found.into(), fix: Some(fix.into()) }
    }

    fn problem(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Problem, found: found.into(), fix: Some(fix.into()) }
    }

    /// A message that ends with its fix, as this program's errors do.
    fn problem_of(check: &'static str, message: &dyn fmt::Display) -> Self {
        Self { check, outcome: Outcome::Problem, found: message.to_string(), fix: None }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self.outcome {
            Outcome::Ok => "ok",
            Outcome::Note => "note",
            Outcome::Problem => "PROBLEM",
        };
        // What other programs are called is theirs to choose.
        let found: String = self.found.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        write!(f, "{outcome:<8} {:<20} {found}", self.check)?;
        match &self.fix {
            Some(fix) => write!(f, "; {fix}"),
            None => Ok(()),
        }
    }
}

/// The report. It displays as one line for each check.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    schema: u32,
    passed: bool,
    checks: Vec<Finding>,
}

impl Diagnosis {
    /// Looks at this host, and at a function if one is given.
    #[must_use]
    pub fn new(address: Option<PciAddress>) -> Self {
        let host = Host { root: PathBuf::from("/") };
        let mut checks = host::check(&host);
        checks.extend(match address {
            Some(address) => function::check(&host, address),
            None => vec![function::candidates()],
        });
        checks.extend(qemu::check(&host));
        let passed = checks.iter().all(|finding| finding.outcome != Outcome::Problem);
        Self { schema: 1, passed, checks }
    }

    /// True if nothing would make serving fail.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.passed
    }

    /// One JSON object, in the format above.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("texts, numbers and booleans")
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.checks.iter().try_for_each(|finding| writeln!(f, "{finding}"))
    }
}

/// The files of a host.
struct Host {
    root: PathBuf,
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read(self.path(name)).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The names in a directory, sorted.
    fn list(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests;
