//! `inspect --json` and `list --json`: one JSON object each, for programs. This file specifies their format.
//!
//! `schema` is 1. It changes if a name is removed or a value changes its meaning; names may be added without a change. Booleans
//! and numbers are JSON booleans and numbers, enumerations are lower-case words, unknown values are null.
//!
//! `inspect --json`:
//!
//! | name | type | meaning |
//! |---|---|---|
//! | `function` | text | PCI address |
//! | `class` | text or null | PCI class code, `0x010802` |
//! | `driver` | text or null | the driver it is bound to |
//! | `iommu_group` | number or null | |
//! | `numa_node` | number or null | null if it has none |
//! | `virtual_function` | boolean | |
//! | `cache_line_bytes` | number or null | cache line size of this CPU; null if it has no instruction to flush with |
//! | `cache_instruction` | `clflushopt`, `clflush`, `dc-civac` or null | |
//! | `interface` | `iommufd`, `type1` or null | the kernel's interface that `--iommu` has chosen |
//! | `snoop_enforced` | boolean or null | VFIO_DMA_CC_IOMMU on a page table or container made for this function |
//! | `iommu` | text or null | the answer of IOMMU_GET_HW_INFO, or of sysfs with type1; no verdict depends on it |
//! | `no_snoop` | `never-set`, `controllable`, `not-ours` or null | the probe of Enable No Snoop with bus master off |
//! | `kvm` | object or null | the shim's answer: `vmm_pid`, `vms`, `registered`, `told` (numbers), `kept` (boolean) |
//! | `verdicts` | object or null | by personality, `vhost_user_blk`, `direct_rings`, `whole_function`: `serves` (boolean), `verdict` (`coherent`, `flush`, `refuse`), `reason` (text) |
//! | `advice` | list of text | how to get a better verdict |
//!
//! `list --json`: `schema`, and `functions`, a list of objects with `function`, `class`, `driver`, `iommu_group` as above,
//! `iommu` (its name in sysfs), `interface` as above, and `verdict` (the word for `vhost_user_blk`, or null).

use serde::Serialize;

use super::list::ListEntry;
use super::report::Report;
use crate::coherency::{NoSnoop, Verdict};
use crate::sys::{CacheLines, Instruction};

const SCHEMA: u32 = 1;

#[derive(Serialize)]
struct ReportJson {
    schema: u32,
    function: String,
    class: Option<String>,
    driver: Option<String>,
    iommu_group: Option<u32>,
    numa_node: Option<u32>,
    virtual_function: bool,
    cache_line_bytes: Option<usize>,
    cache_instruction: Option<&'static str>,
    interface: Option<&'static str>,
    snoop_enforced: Option<bool>,
    iommu: Option<String>,
    no_snoop: Option<&'static str>,
    kvm: Option<KvmJson>,
    verdicts: Option<VerdictsJson>,
    advice: Vec<String>,
}

#[derive(Serialize)]
struct KvmJson {
    vmm_pid: u32,
    vms: u16,
    registered: u16,
    told: u16,
    kept: bool,
}

#[derive(Serialize)]
struct VerdictsJson {
    vhost_user_blk: VerdictJson,
    direct_rings: VerdictJson,
    whole_function: VerdictJson,
}

#[derive(Serialize)]
struct VerdictJson {
    serves: bool,
    verdict: &'static str,
    reason: String,
}

#[derive(Serialize)]
struct ListJson<'a> {
    schema: u32,
    functions: Vec<ListEntryJson<'a>>,
}

#[derive(Serialize)]
struct ListEntryJson<'a> {
    function: String,
    class: &'a str,
    driver: Option<&'a str>,
    iommu_group: Option<u32>,
    iommu: Option<&'a str>,
    interface: Option<&'static str>,
    verdict: Option<&'static str>,
}

impl Report {
    /// The report as one JSON object, in the format above.
    #[must_use]
    pub fn json(&self) -> String {
        text(&self.to_json(CacheLines::detect()))
    }

    fn to_json(&self, lines: Option<CacheLines>) -> ReportJson {
        let evidence = self.evidence.as_ref();
        let fact = |name| self.facts.iter().find(|fact| fact.name == name).map(|fact| fact.value.clone());
        let known = |name| fact(name).filter(|value| value != "none" && value != "unknown");
        let verdict = |n: usize| self.verdicts.get(n).map(|(_, verdict)| VerdictJson::from(verdict));
        let verdicts = verdict(0).zip(verdict(1)).zip(verdict(2));
        ReportJson {
            schema: SCHEMA,
            function: self.address.to_string(),
            class: known("class"),
            driver: known("driver"),
            iommu_group: known("iommu-group").and_then(|group| group.parse().ok()),
            numa_node: known("numa-node").and_then(|node| node.split(',').next()?.parse().ok()),
            virtual_function: fact("virtual").as_deref() == Some("yes"),
            cache_line_bytes: lines.map(|lines| lines.line()),
            cache_instruction: lines.map(|lines| match lines.instruction() {
                Instruction::ClflushOpt => "clflushopt",
                Instruction::Clflush => "clflush",
                Instruction::DcCivac => "dc-civac",
            }),
            interface: evidence.map(|evidence| evidence.snoop.interface.word()),
            snoop_enforced: evidence.map(|evidence| evidence.snoop.enforced),
            iommu: evidence.map(|evidence| evidence.snoop.hardware.clone()),
            no_snoop: evidence.map(|evidence| match evidence.no_snoop {
                NoSnoop::NeverSet => "never-set",
                NoSnoop::Controllable => "controllable",
                NoSnoop::NotOurs(_) => "not-ours",
            }),
            kvm: self.shim.map(|status| KvmJson {
                vmm_pid: status.vmm_pid,
                vms: status.vms,
                registered: status.registered,
                told: status.told,
                kept: status.kept,
            }),
            verdicts: verdicts.map(|((vhost_user_blk, direct_rings), whole_function)| VerdictsJson {
                vhost_user_blk,
                direct_rings,
                whole_function,
            }),
            advice: self.advice.clone(),
        }
    }
}

impl From<&Verdict> for VerdictJson {
    fn from(verdict: &Verdict) -> Self {
        let serves = !matches!(verdict, Verdict::Refuse(_));
        Self { serves, verdict: verdict.word(), reason: verdict.to_string() }
    }
}

/// The list as one JSON object, in the format above.
#[must_use]
pub fn list_json(functions: &[ListEntry]) -> String {
    let functions = functions.iter().map(|entry| ListEntryJson {
        function: entry.address.to_string(),
        class: &entry.class,
        driver: entry.driver.as_deref(),
        iommu_group: entry.group.parse().ok(),
        iommu: entry.iommu.as_deref(),
        interface: entry.verdict().map(|(_, interface)| interface.word()),
        verdict: entry.verdict().map(|(word, _)| word),
    });
    text(&ListJson { schema: SCHEMA, functions: functions.collect() })
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("texts, numbers and booleans")
}

#[cfg(test)]
mod tests {
    use super::super::report::Fact;
    use super::*;
    use crate::acquire::Evidence;
    use crate::coherency::{Coherent, Flush, Refusal};
    use crate::iommu::{Interface, Snoop};

    fn fact(name: &'static str, value: &str) -> Fact {
        Fact { name, value: value.to_owned(), source: String::new() }
    }

    fn report() -> Report {
        Report {
            address: "0000:00:04.0".parse().unwrap(),
            facts: vec![
                fact("class", "0x010802"),
                fact("driver", "vfio-pci"),
                fact("iommu-group", "5"),
                fact("numa-node", "1, CPUs 2-5,8"),
                fact("virtual", "no"),
            ],
            evidence: Some(Evidence {
                snoop: Snoop {
                    interface: Interface::Iommufd,
                    enforced: false,
                    hardware: "Intel VT-d, ECAP.SC=0".into(),
                },
                no_snoop: NoSnoop::Controllable,
                lines: None,
            }),
            shim: None,
            verdicts: vec![
                ("vhost-user-blk", Verdict::Coherent(Coherent::NeverSet)),
                ("direct rings", Verdict::Flush(Flush { requests: true, tell_kvm: false })),
                ("whole function", Verdict::Refuse(Refusal::NoShim)),
            ],
            advice: vec!["say \"no\"".into()],
        }
    }

    #[test]
    fn the_format_of_a_report_is_schema_1() {
        let json = text(&report().to_json(None));

        let expected = concat!(
            r#"{"schema":1,"function":"0000:00:04.0","class":"0x010802","driver":"vfio-pci","iommu_group":5,"#,
            r#""numa_node":1,"virtual_function":false,"cache_line_bytes":null,"cache_instruction":null,"interface":"iommufd","#,
            r#""snoop_enforced":false,"iommu":"Intel VT-d, ECAP.SC=0","no_snoop":"controllable","kvm":null,"verdicts":{"#,
            r#""vhost_user_blk":{"serves":true,"verdict":"coherent","reason":"coherent: the device never sets No Snoop"},"#,
            r#""direct_rings":{"serves":true,"verdict":"flush","reason":"not coherent: flushed at map, at unmap and around "#,
            r#"each request; KVM is not told"},"#,
            r#""whole_function":{"serves":false,"verdict":"refuse","reason":"refused: the device can bypass the CPU "#,
            r#"caches, and KVM cannot be told to let the guest flush them; start QEMU with the shim preloaded and give "#,
            r#"--kvm-socket"}},"advice":["say \"no\""]}"#,
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn unknown_values_are_null() {
        let facts = vec![
            fact("class", "unknown"),
            fact("driver", "none"),
            fact("iommu-group", "none"),
            fact("numa-node", "none"),
        ];
        let report = Report { facts, evidence: None, verdicts: Vec::new(), advice: Vec::new(), ..report() };

        let json = text(&report.to_json(None));

        for name in [
            "numa_node",
            "class",
            "driver",
            "iommu_group",
            "interface",
            "snoop_enforced",
            "iommu",
            "no_snoop",
            "verdicts",
            "kvm",
        ] {
            assert!(json.contains(&format!("\"{name}\":null")), "{name}: {json}");
        }
    }

    #[test]
    fn the_format_of_a_list_is_schema_1() {
        let entry = |driver: Option<&str>, verdict| ListEntry {
            address: "0000:00:04.0".parse().unwrap(),
            class: "0x010802".into(),
            driver: driver.map(str::to_owned),
            group: "5".into(),
            iommu: Some("dmar0".into()),
            verdict,
        };

        let json = list_json(&[entry(Some("vfio-pci"), Some(Ok(("coherent", Interface::Type1)))), entry(None, None)]);

        let expected = concat!(
            r#"{"schema":1,"functions":[{"function":"0000:00:04.0","class":"0x010802","driver":"vfio-pci","#,
            r#""iommu_group":5,"iommu":"dmar0","interface":"type1","verdict":"coherent"},"#,
            r#"{"function":"0000:00:04.0","class":"0x010802","driver":null,"iommu_group":5,"iommu":"dmar0","interface":null,"verdict":null}]}"#,
        );
        assert_eq!(json, expected);
    }
}
