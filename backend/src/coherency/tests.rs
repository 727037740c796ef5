//! Compares the verdict for every combination of facts with a second copy of the table.

use super::*;

const NO_SNOOPS: [NoSnoop; 7] = [
    NoSnoop::NeverSet,
    NoSnoop::Controllable,
    NoSnoop::NotOurs(NotOurs::VirtualFunction),
    NoSnoop::NotOurs(NotOurs::MaybeVirtualFunction),
    NoSnoop::NotOurs(NotOurs::NoCapability),
    NoSnoop::NotOurs(NotOurs::IntegratedGraphics),
    NoSnoop::NotOurs(NotOurs::StaysSet),
];
const POLICIES: [Policy; 4] = [Policy::Suppress, Policy::Allow, Policy::Refuse, Policy::Assume];
const PERSONALITIES: [Personality; 3] = [Personality::Mediated, Personality::DirectRings, Personality::WholeFunction];
const CACHE_OPS: [CacheOps; 4] = [CacheOps::ClflushOpt, CacheOps::Clflush, CacheOps::DcCivac, CacheOps::None];

fn every_combination() -> impl Iterator<Item = Facts> {
    let bits = || [false, true].into_iter();
    bits().flat_map(move |snoop_enforced| {
        NO_SNOOPS.into_iter().flat_map(move |no_snoop| {
            POLICIES.into_iter().flat_map(move |policy| {
                PERSONALITIES.into_iter().flat_map(move |personality| {
                    CACHE_OPS.into_iter().flat_map(move |cache_ops| {
                        bits().flat_map(move |shim| {
                            let facts = move |staging| Facts {
                                snoop_enforced,
                                no_snoop,
                                policy,
                                personality,
                                cache_ops,
                                shim,
                                staging,
                            };
                            bits().map(facts)
                        })
                    })
                })
            })
        })
    })
}

/// The name of the table's cell.
fn cell(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Coherent(Coherent::Enforced) => "enforced",
        Verdict::Coherent(Coherent::NeverSet) => "never",
        Verdict::Coherent(Coherent::Disabled { mask_guest_writes: false }) => "disabled",
        Verdict::Coherent(Coherent::Disabled { mask_guest_writes: true }) => "disabled+mask",
        Verdict::Flush(Flush { requests: true, tell_kvm: true }) => "flush-io+kvm",
        Verdict::Flush(Flush { requests: true, tell_kvm: false }) => "flush-io",
        Verdict::Flush(Flush { requests: false, tell_kvm: true }) => "flush+kvm",
        Verdict::Flush(other) => panic!("no cell has {other:?}"),
        Verdict::Refuse(Refusal::Policy) => "refuse-policy",
        Verdict::Refuse(Refusal::DirectRings) => "refuse-rings",
        Verdict::Refuse(Refusal::NoShim) => "refuse-shim",
        Verdict::Refuse(Refusal::NoCacheOps) => "refuse-ops",
        Verdict::Refuse(Refusal::NoStaging) => "refuse-staging",
    }
}

/// A row of the table where snooping is not enforced: the cells of columns A, B and C with a shim.
fn row(no_snoop: NoSnoop, policy: Policy) -> [&'static str; 3] {
    const FLUSH: [&str; 3] = ["flush-io+kvm", "refuse-rings", "flush+kvm"];
    match (no_snoop, policy) {
        (NoSnoop::NeverSet, Policy::Assume) => FLUSH,
        (NoSnoop::NeverSet, _) => ["never"; 3],
        (NoSnoop::Controllable, Policy::Suppress) => ["disabled", "disabled", "disabled+mask"],
        (_, Policy::Refuse) => ["refuse-policy"; 3],
        _ => FLUSH,
    }
}

#[test]
fn every_combination_of_facts_gets_the_cell_of_the_table() {
    let mut combinations = 0;
    for facts in every_combination() {
        let mut expected = match facts.personality {
            _ if facts.snoop_enforced => "enforced",
            Personality::Mediated => row(facts.no_snoop, facts.policy)[0],
            Personality::DirectRings => row(facts.no_snoop, facts.policy)[1],
            Personality::WholeFunction => row(facts.no_snoop, facts.policy)[2],
        };
        expected = match (expected, facts.shim) {
            ("flush+kvm", _) if !facts.staging => "refuse-staging",
            ("flush+kvm", false) => "refuse-shim",
            ("flush-io+kvm", false) => "flush-io",
            (cell, _) => cell,
        };
        if expected.starts_with("flush") && facts.cache_ops == CacheOps::None {
            expected = "refuse-ops";
        }
        assert_eq!(cell(decide(&facts)), expected, "{facts:?}");
        combinations += 1;
    }
    assert_eq!(combinations, 2 * 7 * 4 * 3 * 4 * 2 * 2);
}

#[test]
fn every_refusal_says_what_is_wrong_and_what_to_do() {
    let refusals = [
        (Refusal::Policy, "--no-snoop=refuse was given", "--no-snoop=suppress"),
        (Refusal::DirectRings, "nothing flushes the guest's rings", "serve the device as vhost-user-blk"),
        (Refusal::NoShim, "KVM cannot be told", "--kvm-socket"),
        (Refusal::NoCacheOps, "no cache-line operations", "an IOMMU that enforces snooping"),
        (Refusal::NoStaging, "before the guest could aim the device at it", "a kernel with iommufd"),
    ];
    for (refusal, wrong, fix) in refusals {
        let text = Verdict::Refuse(refusal).to_string();
        assert!(text.starts_with("refused: ") && text.contains(wrong) && text.contains(fix), "{text}");
    }
}

#[test]
fn no_verdict_flushes_without_cache_operations() {
    for facts in every_combination().filter(|facts| facts.cache_ops == CacheOps::None) {
        assert!(!matches!(decide(&facts), Verdict::Flush(_)), "{facts:?}");
    }
}
