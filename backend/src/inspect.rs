//! Shows what is known about a function's caches, with the source of each fact, and what follows for each kind of service.
//! Nothing is left changed: a function that vfio-pci holds is taken, asked and released; any other is only looked at.

use std::fmt;
use std::fs;
use std::path::Path;

use kvm_vfio_shim::Client;

use crate::acquire::{AcquiredFunction, Evidence};
use crate::coherency::{CacheOps, Facts, NoSnoop, Personality, Policy, Verdict, decide};
use crate::kvm;
use crate::sys::CacheLines;
use crate::vfio::PciAddress;

/// One fact, in words, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// A short name, the same in text and JSON.
    pub name: &'static str,
    /// What was found.
    pub value: String,
    /// Where.
    pub source: String,
}

/// The report on one function.
#[derive(Clone, Debug)]
pub struct Report {
    address: PciAddress,
    facts: Vec<Fact>,
    /// One line for each personality; empty when the evidence cannot be had.
    verdicts: Vec<(&'static str, Verdict)>,
    advice: Vec<String>,
}

const PERSONALITIES: [(&str, Personality); 3] = [
    ("vhost-user-blk", Personality::Mediated),
    ("direct rings", Personality::DirectRings),
    ("whole function", Personality::WholeFunction),
];

impl Report {
    /// Looks at the function, and takes it for a moment if vfio-pci holds it and nobody uses it; asks the shim at
    /// `kvm_socket`.
    #[must_use]
    pub fn new(address: PciAddress, policy: Policy, kvm_socket: Option<&Path>) -> Self {
        let mut report = Self { address, facts: outside(address), verdicts: Vec::new(), advice: Vec::new() };
        let shim = kvm_socket.is_some_and(|socket| report.ask_shim(socket));
        match AcquiredFunction::acquire(address) {
            Ok(acquired) => report.add_evidence(acquired.evidence(), policy, shim),
            Err(error) => {
                report.advice.push(format!("the kernel's own answer needs the function: {error}"));
            }
        }
        report
    }

    /// Adds what the shim in a VM's process says, which changes nothing there. True if there is one to talk with.
    fn ask_shim(&mut self, socket: &Path) -> bool {
        let answer = Client::connect(socket, Client::PATIENCE);
        let value = answer.as_ref().map_or_else(ToString::to_string, |(_, status)| kvm::describe(status));
        self.facts.push(Fact { name: "kvm", value, source: format!("the shim at {}", socket.display()) });
        answer.is_ok()
    }

    fn add_evidence(&mut self, evidence: &Evidence, policy: Policy, shim: bool) {
        let fact = |name, value: String, source: &str| Fact { name, value, source: source.to_owned() };
        self.facts.push(fact(
            "snoop-enforced",
            yes_no(evidence.snoop.enforced).to_owned(),
            "VFIO_CHECK_EXTENSION(VFIO_DMA_CC_IOMMU) on the page table made for this function",
        ));
        self.facts.push(fact("iommu", evidence.snoop.hardware.clone(), "IOMMU_GET_HW_INFO; evidence only"));
        self.facts.push(fact(
            "no-snoop",
            evidence.no_snoop.to_string(),
            "PCI Express Device Control bit 11, set, read back and restored with bus master off; sysfs for virtual functions",
        ));
        for (name, personality) in PERSONALITIES {
            self.verdicts.push((name, decide(&evidence.facts(personality, policy, shim))));
        }
        self.advice.extend(advice(&evidence.facts(Personality::Mediated, policy, shim)));
    }

    /// The report as one JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        let facts = self
            .facts
            .iter()
            .map(|f| format!("{}:{{\"value\":{},\"source\":{}}}", quoted(f.name), quoted(&f.value), quoted(&f.source)));
        let verdicts = self.verdicts.iter().map(|(name, v)| {
            let serves = !matches!(v, Verdict::Refuse(_));
            format!("{}:{{\"serves\":{serves},\"verdict\":{}}}", quoted(name), quoted(&v.to_string()))
        });
        let advice = self.advice.iter().map(|line| quoted(line));
        format!(
            "{{\"function\":{},\"facts\":{{{}}},\"verdicts\":{{{}}},\"advice\":[{}]}}",
            quoted(&self.address.to_string()),
            facts.collect::<Vec<_>>().join(","),
            verdicts.collect::<Vec<_>>().join(","),
            advice.collect::<Vec<_>>().join(",")
        )
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

/// What can be seen without touching the function.
fn outside(address: PciAddress) -> Vec<Fact> {
    let sysfs = address.sysfs();
    let fact = |name, value: Option<String>, none: &str, file: &str| Fact {
        name,
        value: value.unwrap_or_else(|| none.to_owned()),
        source: sysfs.join(file).display().to_string(),
    };
    let class = fs::read_to_string(sysfs.join("class")).ok().map(|text| text.trim().to_owned());
    let cpu = CacheLines::detect().map(|lines| format!("{:?}, lines of {} bytes", lines.instruction(), lines.line()));
    vec![
        fact("class", class, "unknown", "class"),
        fact("driver", address.driver(), "none", "driver"),
        fact("iommu-group", address.group(), "none", "iommu_group"),
        fact("virtual", Some(yes_no(address.is_virtual_function()).to_owned()), "", "physfn"),
        Fact { name: "cache-ops", value: cpu.unwrap_or_else(|| "none".to_owned()), source: "this CPU".to_owned() },
    ]
}

/// What would lead to a better verdict.
fn advice(facts: &Facts) -> Option<String> {
    let better = match (decide(facts), facts.no_snoop) {
        (Verdict::Coherent(_), _) => return None,
        (_, NoSnoop::Controllable) => "--no-snoop=suppress holds the bit off, and nothing needs flushing",
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

/// Every function that has an IOMMU group, one line each: address, class, driver, group, IOMMU, and the verdict in a word.
#[must_use]
pub fn list() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/bus/pci/devices") else { return Vec::new() };
    let mut addresses: Vec<_> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    addresses.sort_by_key(PciAddress::to_string);
    addresses.into_iter().filter_map(line).collect()
}

fn line(address: PciAddress) -> Option<String> {
    let group = address.group()?;
    let class = fs::read_to_string(address.sysfs().join("class")).unwrap_or_default();
    let driver = address.driver().unwrap_or_else(|| "-".to_owned());
    let word = if driver == "vfio-pci" { verdict_word(address) } else { "?".to_owned() };
    let iommu = fs::read_link(address.sysfs().join("iommu")).ok();
    let iommu = iommu.as_ref().and_then(|link| link.file_name()?.to_str()).unwrap_or("-");
    Some(format!("{address}  {}  {driver:<12} group {group:<4} {iommu:<8} {word}", class.trim()))
}

fn verdict_word(address: PciAddress) -> String {
    match AcquiredFunction::acquire(address) {
        Err(error) => format!("? ({error})"),
        Ok(acquired) => {
            decide(&acquired.evidence().facts(Personality::Mediated, Policy::default(), false)).word().to_owned()
        }
    }
}

fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// A JSON string (RFC 8259 §7).
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coherency::NotOurs;

    fn facts(no_snoop: NoSnoop, policy: Policy) -> Facts {
        let (snoop_enforced, personality, shim) = (false, Personality::Mediated, false);
        Facts { snoop_enforced, no_snoop, policy, personality, cache_ops: CacheOps::ClflushOpt, shim }
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

    #[test]
    fn json_strings_are_escaped() {
        assert_eq!(quoted("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
    }
}
