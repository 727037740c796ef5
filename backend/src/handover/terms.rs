//! What both processes must have been started with. The front-end has seen all of it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The options that both must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// `--device`.
    pub device: String,
    /// `--queues`.
    pub queues: u16,
    /// `--namespace`.
    pub namespace: Option<u32>,
    /// `--read-only`.
    pub read_only: bool,
    /// `--no-snoop`.
    pub no_snoop: String,
    /// `--kvm-socket`.
    pub kvm_socket: Option<PathBuf>,
}

impl Terms {
    /// Why a process with the terms `successor` cannot go on where one with `self` stops; `None` if it can.
    #[must_use]
    pub fn conflict(&self, successor: &Self) -> Option<String> {
        let differs = |option: &str, mine: &dyn fmt::Display, theirs: &dyn fmt::Display| {
            format!("this process has {option} {mine}, the successor {theirs}; start it with the same")
        };
        let text = |namespace: Option<u32>| namespace.map_or_else(|| "(the only one)".to_owned(), |id| id.to_string());
        let path = |path: &Option<PathBuf>| {
            path.as_ref().map_or_else(|| "(none)".to_owned(), |path| path.display().to_string())
        };
        if self.device != successor.device {
            Some(differs("--device", &self.device, &successor.device))
        } else if self.queues != successor.queues {
            Some(differs("--queues", &self.queues, &successor.queues))
        } else if self.namespace != successor.namespace {
            Some(differs("--namespace", &text(self.namespace), &text(successor.namespace)))
        } else if self.read_only != successor.read_only {
            Some(differs("--read-only", &self.read_only, &successor.read_only))
        } else if self.no_snoop != successor.no_snoop {
            Some(differs("--no-snoop", &self.no_snoop, &successor.no_snoop))
        } else if self.kvm_socket != successor.kvm_socket {
            Some(differs("--kvm-socket", &path(&self.kvm_socket), &path(&successor.kvm_socket)))
        } else {
            None
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn terms() -> Terms {
        Terms {
            device: "0000:00:04.0".into(),
            queues: 2,
            namespace: None,
            read_only: false,
            no_snoop: "suppress".into(),
            kvm_socket: None,
        }
    }

    #[test]
    fn equal_terms_do_not_conflict() {
        assert_eq!(terms().conflict(&terms()), None);
    }

    #[test]
    fn each_term_that_differs_is_named_with_both_values() {
        let cases = [
            (Terms { device: "emulated".into(), ..terms() }, "--device 0000:00:04.0, the successor emulated"),
            (Terms { queues: 4, ..terms() }, "--queues 2, the successor 4"),
            (Terms { namespace: Some(3), ..terms() }, "--namespace (the only one), the successor 3"),
            (Terms { read_only: true, ..terms() }, "--read-only false, the successor true"),
            (Terms { no_snoop: "allow".into(), ..terms() }, "--no-snoop suppress, the successor allow"),
            (Terms { kvm_socket: Some("/k".into()), ..terms() }, "--kvm-socket (none), the successor /k"),
        ];
        for (other, part) in cases {
            let conflict = terms().conflict(&other).expect(part);
            assert!(conflict.contains(part), "{part} in: {conflict}");
        }
    }
}
