//! `doctor`: goes through what a first run needs, and says of each thing whether it is there, and if not, how to get it. Nothing
//! stays changed: a function bound to vfio-pci is acquired and released, as by `inspect`, and landlock is tried on a thread that
//! ends. Everything else is only read.
//!
//! `doctor --json` prints one object: `schema` (1), `passed` (boolean), and `checks`, a list of objects with `check`, `outcome`
//! (`ok`, `note`, `problem`), `found` and `fix` (text or null). It changes as that of `inspect` does.

mod finding;
mod function;
mod host;
mod qemu;
mod sandbox;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

pub use finding::{Finding, Outcome};

use crate::vfio::PciAddress;
use finding::Host;

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
        checks.extend(sandbox::check());
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

#[cfg(test)]
mod tests;
