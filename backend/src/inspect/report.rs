//! The report of `inspect`: each fact with its source, and the verdict for each personality. Nothing stays changed: a function
//! bound to vfio-pci is acquired, probed and released; of any other only sysfs is read.

use std::fmt;
use std::fs;
use std::path::Path;

use kvm_vfio_shim::{Client, Status};

use crate::acquire::{AcquiredFunction, Evidence};
use crate::coherency::{CacheOps, Facts, NoSnoop, Personality, Policy, Verdict, decide};
use crate::iommu::Interface;
use crate::kvm;
use crate::placement::Node;
use crate::sys::CacheLines;
use crate::vfio::{InterfaceChoice, PciAddress};

/// One fact as text, with its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// A short name.
    pub name: &'static str,
    /// The value.
    pub value: String,
    /// The source, such as a file in sysfs.
    pub source: String,
}

/// The report on one function. It displays as text; [`Report::json`] is for programs.
#[derive(Clone, Debug)]
pub struct Report {
    pub(super) address: PciAddress,
    pub(super) facts: Vec<Fact>,
    /// The evidence for the verdicts; `None` if the function cannot be acquired.
    pub(super) evidence: Option<Evidence>,
    /// The shim's answer, if there is one.
    pub(super) shim: Option<Status>,
    /// One line for each personality; empty without evidence.
    pub(super) verdicts: Vec<(&'static str, Verdict)>,
    pub(super) advice: Vec<String>,
}

const PERSONALITIES: [(&str, Personality); 3] = [
    ("vhost-user-blk", Personality::Mediated),
    ("direct rings", Personality::DirectRings),
    ("whole function", Personality::WholeFunction),
];

impl Report {
    /// Reads sysfs, queries the shim at `kvm_socket`, and acquires the function for a moment if it is bound to vfio-pci and not
    /// in use.
    #[must_use]
    pub fn new(address: PciAddress, choice: InterfaceChoice, policy: Policy, kvm_socket: Option<&Path>) -> Self {
        let mut report = Self {
            address,
            facts: sysfs_facts(address),
            evidence: None,
            shim: None,
            verdicts: Vec::new(),
            advice: Vec::new(),
        };
        let shim = kvm_socket.is_some_and(|socket| report.query_shim(socket));
        match AcquiredFunction::acquire(address, choice) {
            Ok(acquired) => {
                let source = acquired.why().to_owned();
                let interface = acquired.evidence().snoop.interface;
                report.facts.push(Fact { name: "interface", value: interface.to_string(), source });
                report.add_evidence(acquired.evidence(), policy, shim);
            }
            Err(error) => {
                report.advice.push(format!("the function could not be acquired, so there is no verdict: {error}"));
            }
        }
        report
    }

    /// Adds the status of the shim in a VM's process, and changes nothing there. True if the shim has answered.
    fn query_shim(&mut self, socket: &Path) -> bool {
        let answer = Client::connect(socket, Client::DEFAULT_TIMEOUT);
        let value = answer.as_ref().map_or_else(ToString::to_string, |(_, status)| kvm::describe(status));
        self.facts.push(Fact { name: "kvm", value, source: format!("the shim at {}", socket.display()) });
        self.shim = answer.ok().map(|(_, status)| status);
        self.shim.is_some()
    }

    fn add_evidence(&mut self, evidence: &Evidence, policy: Policy, shim: bool) {
        let fact = |name, value: String, source: &str| Fact { name, value, source: source.to_owned() };
        self.facts.push(fact(
            "snoop-enforced",
            yes_no(evidence.snoop.enforced).to_owned(),
            match evidence.snoop.interface {
                Interface::Iommufd => {
                    "VFIO_CHECK_EXTENSION(VFIO_DMA_CC_IOMMU) on the page table made for this function"
                }
                Interface::Type1 => "VFIO_CHECK_EXTENSION(VFIO_DMA_CC_IOMMU) on the container of this function's group",
            },
        ));
        let source = match evidence.snoop.interface {
            Interface::Iommufd => "IOMMU_GET_HW_INFO; evidence only",
            Interface::Type1 => "sysfs; evidence only",
        };
        self.facts.push(fact("iommu", evidence.snoop.hardware.clone(), source));
        self.facts.push(fact(
            "no-snoop",
            evidence.no_snoop.to_string(),
            "PCI Express Device Control bit 11, set, read back and restored with bus master off; sysfs for virtual functions",
        ));
        for (name, personality) in PERSONALITIES {
            self.verdicts.push((name, decide(&evidence.facts(personality, policy, shim))));
        }
        self.evidence = Some(evidence.clone());
        self.advice.extend(advice(&evidence.facts(Personality::Mediated, policy, shim)));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.address)?;
        for fact in &self.facts {
            writeln!(f, "  {:<15} {}", fact.name, fact.value)?;
            writeln!(f, "  {:<15}   from {}", "", fact.source)?;
        }
        for (name, verdict) in &self.verdicts {
            writeln!(f, "  as {name:<15} {verdict}")?;
        }
        for line in &self.advice {
            writeln!(f, "  note: {line}")?;
        }
        Ok(())
    }
}

/// The facts that can be read without opening the function.
fn sysfs_facts(address: PciAddress) -> Vec<Fact> {
    let sysfs = address.sysfs();
    let fact = |name, value: Option<String>, none: &str, file: &str| Fact {
        name,
        value: value.unwrap_or_else(|| none.to_owned()),
        source: sysfs.join(file).display().to_string(),
    };
    let node = Node::of_device(&sysfs);
    let class = fs::read_to_string(sysfs.join("class")).ok().map(|text| text.trim().to_owned());
    let cpu = CacheLines::detect().map(|lines| format!("{:?}, lines of {} bytes", lines.instruction(), lines.line()));
    vec![
        fact("class", class, "unknown", "class"),
        fact("driver", address.driver(), "none", "driver"),
        fact("iommu-group", address.group(), "none", "iommu_group"),
        fact("numa-node", node.map(|node| format!("{}, CPUs {}", node.number, node.cpus)), "none", "numa_node"),
        fact("virtual", Some(yes_no(address.is_virtual_function()).to_owned()), "", "physfn"),
        Fact { name: "cache-ops", value: cpu.unwrap_or_else(|| "none".to_owned()), source: "this CPU".to_owned() },
    ]
}

/// How to get a better verdict.
fn advice(facts: &Facts) -> Option<String> {
    let better = match (decide(facts), facts.no_snoop) {
        (Verdict::Coherent(_), _) => return None,
        (_, NoSnoop::Controllable) => "--no-snoop=suppress keeps the bit clear, so no flushing is needed",
        (_, NoSnoop::NeverSet) => {
            "the device's bit says that it never uses No Snoop; drop --no-snoop=assume if that is true"
        }
        (_, NoSnoop::NotOurs(_)) if facts.cache_ops == CacheOps::None => "an IOMMU that enforces snooping",
        (_, NoSnoop::NotOurs(_)) => {
            "an IOMMU that enforces snooping (VT-d with ECAP.SC, any AMD-Vi) needs no flushing; \
             for a virtual function, clear Enable No Snoop in its physical function"
        }
    };
    Some(better.to_owned())
}

fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coherency::NotOurs;

    fn facts(no_snoop: NoSnoop, policy: Policy) -> Facts {
        let (snoop_enforced, personality, shim, staging) = (false, Personality::Mediated, false, true);
        Facts { snoop_enforced, no_snoop, policy, personality, cache_ops: CacheOps::ClflushOpt, shim, staging }
    }

    #[test]
    fn a_coherent_verdict_needs_no_advice() {
        assert_eq!(advice(&facts(NoSnoop::NeverSet, Policy::Suppress)), None);
        assert_eq!(advice(&facts(NoSnoop::Controllable, Policy::Suppress)), None);
    }

    #[test]
    fn every_other_verdict_gets_advice_that_would_change_it() {
        let to_suppress = advice(&facts(NoSnoop::Controllable, Policy::Allow)).unwrap();
        let to_drop = advice(&facts(NoSnoop::NeverSet, Policy::Assume)).unwrap();
        let to_move = advice(&facts(NoSnoop::NotOurs(NotOurs::VirtualFunction), Policy::Suppress)).unwrap();
        assert!(to_suppress.contains("--no-snoop=suppress"), "{to_suppress}");
        assert!(to_drop.contains("drop --no-snoop=assume"), "{to_drop}");
        assert!(to_move.contains("physical function"), "{to_move}");
    }
}
