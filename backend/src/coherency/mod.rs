//! Can this device's DMA bypass the CPU caches, and what must be done about it? One pure function decides, from facts that
//! other modules gather. This module has no descriptor, no `unsafe` and no I/O.
//!
//! A PCI Express function may mark a transaction No Snoop (PCIe 6.0 §2.2.6.5). Unless the IOMMU overrides the attribute, such a
//! read returns DRAM instead of a dirty cache line, and such a write leaves a stale line in the cache.
//!
//! | snoop enforced | No Snoop      | policy   | A mediated     | B direct rings | C whole function                     |
//! |----------------|---------------|----------|----------------|----------------|--------------------------------------|
//! | yes            | any           | any      | enforced       | enforced       | enforced                             |
//! | no             | never set     | any but assume | never set | never set     | never set                            |
//! | no             | controllable  | suppress | disabled       | disabled       | disabled, the guest's writes masked  |
//! | no             | controllable  | allow    | flush, tell    | refuse         | flush, tell; refuse without a shim   |
//! | no             | not ours      | suppress, allow | flush, tell | refuse     | flush, tell; refuse without a shim   |
//! | no             | any           | assume   | flush, tell    | refuse         | flush, tell; refuse without a shim   |
//! | no             | controllable, not ours | refuse | refuse  | refuse         | refuse                               |
//!
//! A cell that flushes becomes a refusal if this CPU has no cache-line operations for user space. In column C it also does if
//! memory cannot be flushed before the device can reach it, as with VFIO type1: a guest that drives the device could aim it at
//! that memory. *Tell*: KVM is told through the shim in the VM's process, if there is one; see `kvm`.
//!
//! Why the columns differ: in A the guest's virtio driver assumes coherent DMA and never flushes, but every request passes
//! through this process, which flushes. In B the device reads the guest's rings directly, and nothing flushes. In C the guest
//! runs the device's own driver, which may use No Snoop and flush by itself; KVM must then let its cache instructions through.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the probe of the Enable No Snoop bit has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoSnoop {
    /// Enable No Snoop is hardwired to zero: the function never sets the attribute (PCIe 6.0 §7.5.3.4).
    NeverSet,
    /// The bit can be set and cleared, and only by this process.
    Controllable,
    /// The function has no such bit, or the bit does not control its transactions.
    NotOurs(NotOurs),
}

/// Why the bit cannot be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotOurs {
    /// A virtual function: its bit is reserved, and the physical function's bit applies (PCIe 6.0 §9.3.5.4).
    VirtualFunction,
    /// Perhaps a virtual function: nothing that can be read here tells.
    MaybeVirtualFunction,
    /// No PCI Express capability, so no such bit.
    NoCapability,
    /// Intel integrated graphics, which ignores the bit.
    IntegratedGraphics,
    /// The bit reads 1 after it was cleared.
    StaysSet,
}

/// `--no-snoop`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// Keep the bit clear if possible, else flush.
    #[default]
    Suppress,
    /// Leave the bit as it is, and flush.
    Allow,
    /// Serve only a device that never sets No Snoop, or that is behind an IOMMU that enforces snooping.
    Refuse,
    /// Assume that the device bypasses the caches, whatever its bit says.
    Assume,
}

/// How the device is given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Personality {
    /// A: this process drives the device.
    Mediated,
    /// B: the device serves the guest's own rings.
    DirectRings,
    /// C: the guest drives the whole function.
    WholeFunction,
}

/// The CPU's instruction for user space to write back and invalidate a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheOps {
    /// x86 CLFLUSHOPT.
    ClflushOpt,
    /// x86 CLFLUSH.
    Clflush,
    /// Arm DC CIVAC.
    DcCivac,
    /// There is none.
    None,
}

/// The input of the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The IOMMU forces every transaction of the device to snoop.
    pub snoop_enforced: bool,
    /// The device's Enable No Snoop bit.
    pub no_snoop: NoSnoop,
    /// The operator's policy.
    pub policy: Policy,
    /// How the device is given to the guest.
    pub personality: Personality,
    /// What the CPU can flush with.
    pub cache_ops: CacheOps,
    /// A shim inside the VMM can tell KVM.
    pub shim: bool,
    /// Memory can be flushed before the device can reach it.
    pub staging: bool,
}

/// The decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// DMA is coherent; nothing to flush.
    Coherent(Coherent),
    /// DMA may bypass the caches: flush when memory is mapped and when it is unmapped.
    Flush(Flush),
    /// The device cannot be served correctly.
    Refuse(Refusal),
}

/// Why DMA is coherent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coherent {
    /// The IOMMU enforces snooping.
    Enforced,
    /// The device never sets No Snoop.
    NeverSet,
    /// This process keeps Enable No Snoop clear.
    Disabled {
        /// The guest can write configuration space, so its writes to the bit must be masked.
        mask_guest_writes: bool,
    },
}

/// What a flushing verdict requires besides the flushes at map and unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// Also flush around each request, and the device's own queues.
    pub requests: bool,
    /// Tell KVM. Otherwise it reports coherent DMA to its users, and the guest's own cache instructions have no effect.
    pub tell_kvm: bool,
}

/// Why the device cannot be served correctly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The policy is [`Policy::Refuse`].
    Policy,
    /// The device would read rings that nothing flushes.
    DirectRings,
    /// KVM cannot be told.
    NoShim,
    /// The CPU has no instruction to flush with.
    NoCacheOps,
    /// Memory cannot be flushed before the guest's driver could use it.
    NoStaging,
}

/// Decides, by the table above.
#[must_use]
pub fn decide(facts: &Facts) -> Verdict {
    use NoSnoop::{Controllable, NeverSet, NotOurs};
    use Policy::{Allow, Assume, Refuse, Suppress};
    if facts.snoop_enforced {
        return Verdict::Coherent(Coherent::Enforced);
    }
    match (facts.no_snoop, facts.policy) {
        (NeverSet, Suppress | Allow | Refuse) => Verdict::Coherent(Coherent::NeverSet),
        (Controllable, Suppress) => {
            let mask_guest_writes = facts.personality == Personality::WholeFunction;
            Verdict::Coherent(Coherent::Disabled { mask_guest_writes })
        }
        (Controllable, Allow) | (NotOurs(_), Suppress | Allow) | (_, Assume) => flush(facts),
        (Controllable | NotOurs(_), Refuse) => Verdict::Refuse(Refusal::Policy),
    }
}

/// The cells of the rows that flush.
fn flush(facts: &Facts) -> Verdict {
    let with = |requests, tell_kvm| match facts.cache_ops {
        CacheOps::None => Verdict::Refuse(Refusal::NoCacheOps),
        _ => Verdict::Flush(Flush { requests, tell_kvm }),
    };
    match (facts.personality, facts.shim) {
        (Personality::WholeFunction, _) if !facts.staging => Verdict::Refuse(Refusal::NoStaging),
        (Personality::Mediated, shim) => with(true, shim),
        (Personality::DirectRings, _) => Verdict::Refuse(Refusal::DirectRings),
        (Personality::WholeFunction, true) => with(false, true),
        (Personality::WholeFunction, false) => Verdict::Refuse(Refusal::NoShim),
    }
}

impl Verdict {
    /// The verdict as one word, for JSON and the statistics.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Coherent(_) => "coherent",
            Self::Flush(_) => "flush",
            Self::Refuse(_) => "refuse",
        }
    }
}

impl fmt::Display for NoSnoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeverSet => "No Snoop never set (the bit is hardwired to 0)",
            Self::Controllable => "No Snoop controllable (the bit can be set and cleared)",
            Self::NotOurs(NotOurs::VirtualFunction) => "No Snoop governed by the physical function",
            Self::NotOurs(NotOurs::MaybeVirtualFunction) => {
                "No Snoop unknown (it may be a virtual function; mount /sys and /proc to tell)"
            }
            Self::NotOurs(NotOurs::NoCapability) => "No Snoop unknown (no PCI Express capability)",
            Self::NotOurs(NotOurs::StaysSet) => "No Snoop uncontrollable (the bit reads 1 after it was cleared)",
            Self::NotOurs(NotOurs::IntegratedGraphics) => "No Snoop unknown (integrated graphics ignores the bit)",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coherent(Coherent::Enforced) => "coherent: the IOMMU enforces snooping",
            Self::Coherent(Coherent::NeverSet) => "coherent: the device never sets No Snoop",
            Self::Coherent(Coherent::Disabled { .. }) => "coherent: No Snoop is disabled",
            Self::Flush(Flush { requests, tell_kvm }) => {
                let requests = if *requests { ", at unmap and around each request" } else { " and at unmap" };
                let kvm = if *tell_kvm { "KVM is told" } else { "KVM is not told" };
                return write!(f, "not coherent: flushed at map{requests}; {kvm}");
            }
            Self::Refuse(refusal) => return refusal.fmt(f),
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Policy => {
                "refused: the device can bypass the CPU caches and --no-snoop=refuse was given; \
                 use an IOMMU that enforces snooping, or --no-snoop=suppress"
            }
            Self::DirectRings => {
                "refused: the device can bypass the CPU caches, and nothing flushes the guest's rings; \
                 use an IOMMU that enforces snooping, or serve the device as vhost-user-blk"
            }
            Self::NoShim => {
                "refused: the device can bypass the CPU caches, and KVM cannot be told to let the guest flush them; \
                 start QEMU with the shim preloaded and give --kvm-socket"
            }
            Self::NoCacheOps => {
                "refused: the device can bypass the CPU caches, and this CPU has no cache-line operations for user space; \
                 use an IOMMU that enforces snooping"
            }
            Self::NoStaging => {
                "refused: the device can bypass the CPU caches, and with VFIO type1 memory cannot be flushed before the guest \
                 could aim the device at it; use a kernel with iommufd, or an IOMMU that enforces snooping"
            }
        })
    }
}

#[cfg(test)]
mod tests;
