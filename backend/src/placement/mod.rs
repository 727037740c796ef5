//! On which CPUs the workers run: on those of `--cpus`, else on those of the drive's NUMA node. A worker on another node pays for
//! each completion entry and doorbell with a transfer between the nodes.
//!
//! | `--cpus` | the drive's node | the workers run on |
//! |---|---|---|
//! | a list | | the CPUs of the list that the kernel lets this process use; none is an error |
//! | none | is known | the CPUs of the node that this process runs on; if there is none, where this process runs |
//! | none | is not known | where this process runs |
//!
//! Where this process runs is its own affinity (`taskset`, `CPUAffinity=`), within its cpuset. A list may name more: the CPUs that
//! `isolcpus` keeps free for programs that poll are in no process's affinity unless it asks for them.
//!
//! A list with at least as many CPUs as there are workers is divided among them, so that no two that poll share one. Otherwise each
//! worker may run on the whole set, and the scheduler distributes them.

mod affinity;
mod cpu_list;

use std::fmt;
use std::fs;
use std::path::Path;

pub use affinity::{own, permitted, place, run_on};
pub use cpu_list::{CpuList, NotACpuList};

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// `--cpus`.
    pub list: Option<CpuList>,
    /// What the kernel lets this process use (its cpuset).
    pub permitted: CpuList,
    /// The affinity of this process.
    pub own: CpuList,
    /// The drive's NUMA node, if it has one and sysfs tells.
    pub node: Option<Node>,
}

/// A NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// Its CPUs.
    pub cpus: CpuList,
}

/// Where the workers run, and why. It displays as one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// On these CPUs of `--cpus`.
    List(CpuList),
    /// On these CPUs of the drive's node.
    Node(u32, CpuList),
    /// Where this process runs, which has no CPU of the drive's node.
    NotOnNode(Node, CpuList),
    /// Where this process runs, because the drive has no node.
    NoNode(CpuList),
}

/// No CPU of `--cpus` can be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "--cpus {list}: this process may use none of these, only {permitted}; give some of those, or allow more (AllowedCPUs= of \
     systemd, the cpuset of a container)"
)]
pub struct NotPermitted {
    list: String,
    permitted: String,
}

/// The workers' CPUs. The default leaves them as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    cpus: Option<CpuList>,
    divided: bool,
}

/// The table at the top of this file.
///
/// # Errors
/// [`NotPermitted`].
pub fn choose(facts: &Facts) -> Result<Choice, NotPermitted> {
    let Facts { list, permitted, own, node } = *facts;
    match (list, node) {
        (Some(list), _) => {
            let usable = list.common(&permitted);
            if usable.is_empty() {
                return Err(NotPermitted { list: list.to_string(), permitted: permitted.to_string() });
            }
            Ok(Choice::List(usable))
        }
        (None, Some(node)) => {
            let usable = node.cpus.common(&own);
            Ok(if usable.is_empty() { Choice::NotOnNode(node, own) } else { Choice::Node(node.number, usable) })
        }
        (None, None) => Ok(Choice::NoNode(own)),
    }
}

impl Choice {
    /// See [`Placement`].
    #[must_use]
    pub fn placement(&self) -> Placement {
        match *self {
            Self::List(cpus) => Placement { cpus: Some(cpus), divided: true },
            Self::Node(_, cpus) => Placement { cpus: Some(cpus), divided: false },
            Self::NotOnNode(..) | Self::NoNode(_) => Placement::default(),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(cpus) => write!(f, "workers run on CPUs {cpus}, because of --cpus"),
            Self::Node(node, cpus) => write!(f, "workers run on CPUs {cpus}, because the drive is on NUMA node {node}"),
            Self::NotOnNode(node, own) => write!(
                f,
                "workers run on CPUs {own}, although the drive is on NUMA node {} (CPUs {}): the affinity of this process has none \
                 of those; change CPUAffinity= or the cpuset, or give --cpus",
                node.number, node.cpus
            ),
            Self::NoNode(own) => write!(f, "workers run on CPUs {own}; sysfs names no NUMA node of the drive"),
        }
    }
}

impl Placement {
    /// The CPUs of `worker`, one of `workers`; `None`: as they are.
    #[must_use]
    pub fn of_worker(&self, worker: usize, workers: usize) -> Option<CpuList> {
        let cpus = self.cpus?;
        let count = cpus.count();
        if !self.divided || count < workers {
            return Some(cpus);
        }
        let (first, end) = (worker * count / workers, (worker + 1) * count / workers);
        Some(cpus.iter().skip(first).take(end - first).collect())
    }
}

impl Node {
    /// The node of the device with this directory in sysfs. `None` if it has none (-1), as on a machine with one node, or the
    /// files are absent (a kernel without NUMA).
    #[must_use]
    pub fn of_device(directory: &Path) -> Option<Self> {
        let read = |name| fs::read_to_string(directory.join(name)).ok();
        let number = read("numa_node")?.trim().parse().ok()?;
        Some(Self { number, cpus: CpuList::of_sysfs(&read("local_cpulist")?).ok()? })
    }
}

#[cfg(test)]
mod tests;
