//! Can this device's DMA go behind the CPU caches, and what follows? One pure function answers, from facts that others
//! gather; everything else obeys. No descriptor, no `unsafe`, no I/O in this room.
//!
//! A PCI Express function may mark a transaction No Snoop (PCIe 6.0 §2.2.6.5). Unless the IOMMU overrides the mark, such a
//! read sees DRAM instead of a dirty cache line, and such a write leaves a stale line in the cache.
//!
//! | snoop enforced | No Snoop      | policy   | A mediated     | B direct rings | C whole function                     |
//! |----------------|---------------|----------|----------------|----------------|--------------------------------------|
//! | yes            | any           | any      | enforced       | enforced       | enforced                             |
//! | no             | never set     | any but assume | never set | never set     | never set                            |
//! | no             | controllable  | suppress | held off       | held off       | held off, the guest's writes masked  |
//! | no             | controllable  | allow    | flush, tell    | refuse         | flush, tell; refuse without a shim   |
//! | no             | not ours      | suppress, allow | flush, tell | refuse     | flush, tell; refuse without a shim   |
//! | no             | any           | assume   | flush, tell    | refuse         | flush, tell; refuse without a shim   |
//! | no             | controllable, not ours | refuse | refuse  | refuse         | refuse                               |
//!
//! A row that flushes refuses if this CPU gives programs no cache-line operations. *Tell*: KVM hears of it through the shim in
//! the VM's process, if one is there; how that is done, and what if it fails, is the room `kvm`'s matter.
//!
//! Why the columns differ: in A the guest's virtio driver takes DMA for coherent and never flushes, but every request passes
//! through this process, which can. In B the device reads the guest's rings with nobody in between. In C the guest runs the
//! device's own driver, which may use No Snoop and flush by itself; KVM must then let its cache instructions through.

use std::fmt;

/// What the device may do about No Snoop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSnoop {
    /// Enable No Snoop is hardwired to zero: the function never sets the mark (PCIe 6.0 §7.5.3.4).
    NeverSet,
    /// The bit can be set and cleared, by us alone.
    Controllable,
    /// The bit is not there, does not govern, or governs elsewhere.
    NotOurs(NotOurs),
}

/// Why the bit cannot be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotOurs {
    /// A virtual function: the bit is reserved there, the physical function's governs (PCIe 6.0 §9.3.5.4).
    VirtualFunction,
    /// No PCI Express capability, so no such bit.
    NoCapability,
    /// Intel integrated graphics, whose traffic does not honour the bit.
    IntegratedGraphics,
    /// The bit reads 1 after it was cleared.
    Disobeys,
}

/// What the operator wants (`--no-snoop`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Hold the bit off where that is possible.
    #[default]
    Suppress,
    /// Let the device use it, and flush.
    Allow,
    /// Serve only a device whose DMA is coherent by itself or by the IOMMU.
    Refuse,
    /// The device goes behind the caches whatever its bit says.
    Assume,
}

/// How the device is given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Personality {
    /// A: this process drives the device.
    Mediated,
    /// B: the device serves the guest's own rings.
    DirectRings,
    /// C: the guest drives the whole function.
    WholeFunction,
}

/// How this CPU lets a program write back and invalidate a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheOps {
    /// x86 CLFLUSHOPT.
    ClflushOpt,
    /// x86 CLFLUSH.
    Clflush,
    /// Arm DC CIVAC.
    DcCivac,
    /// Not at all.
    None,
}

/// Everything the decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The IOMMU forces every transaction of the device to snoop.
    pub snoop_enforced: bool,
    /// The device's own bit.
    pub no_snoop: NoSnoop,
    /// The operator's wish.
    pub policy: Policy,
    /// The kind of service.
    pub personality: Personality,
    /// What the CPU offers.
    pub cache_ops: CacheOps,
    /// A shim inside the VMM can tell KVM.
    pub shim: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// DMA is coherent; nothing to flush.
    Coherent(Coherent),
    /// DMA may go behind the caches: flush when memory becomes reachable and when it no longer is.
    Flush(Flush),
    /// It cannot be done right.
    Refuse(Refusal),
}

/// Why DMA is coherent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coherent {
    /// The IOMMU overrides the mark.
    Enforced,
    /// The device never sets it.
    NeverSet,
    /// The bit is held at zero by this process.
    HeldOff {
        /// The guest can reach configuration space, so its writes to the bit must be masked.
        mask_guest_writes: bool,
    },
}

/// What a flushing verdict asks for, beside the flushes at map and unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// Flush around each request too, and the device's own queues.
    pub requests: bool,
    /// Tell KVM: it keeps KVM's answer true, and without it the guest's own cache instructions have no effect.
    pub tell_kvm: bool,
}

/// Why it cannot be done right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The operator asked for it.
    Policy,
    /// The device would read rings that nobody flushes.
    DirectRings,
    /// KVM cannot be told.
    NoShim,
    /// Nothing to flush with.
    NoCacheOps,
}

/// Decides. The arms stand in the order of the table above.
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
            Verdict::Coherent(Coherent::HeldOff { mask_guest_writes })
        }
        (Controllable, Allow) | (NotOurs(_), Suppress | Allow) | (_, Assume) => flush(facts),
        (Controllable | NotOurs(_), Refuse) => Verdict::Refuse(Refusal::Policy),
    }
}

/// The cells that flush, by column.
fn flush(facts: &Facts) -> Verdict {
    let with = |requests, tell_kvm| match facts.cache_ops {
        CacheOps::None => Verdict::Refuse(Refusal::NoCacheOps),
        _ => Verdict::Flush(Flush { requests, tell_kvm }),
    };
    match (facts.personality, facts.shim) {
        (Personality::Mediated, shim) => with(true, shim),
        (Personality::DirectRings, _) => Verdict::Refuse(Refusal::DirectRings),
        (Personality::WholeFunction, true) => with(false, true),
        (Personality::WholeFunction, false) => Verdict::Refuse(Refusal::NoShim),
    }
}

impl Verdict {
    /// In one word.
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
            Self::NotOurs(NotOurs::NoCapability) => "No Snoop unknown (no PCI Express capability)",
            Self::NotOurs(NotOurs::Disobeys) => "No Snoop uncontrollable (the bit reads 1 after it was cleared)",
            Self::NotOurs(NotOurs::IntegratedGraphics) => "No Snoop unknown (integrated graphics ignores the bit)",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coherent(Coherent::Enforced) => "coherent: the IOMMU enforces snooping",
            Self::Coherent(Coherent::NeverSet) => "coherent: the device never sets No Snoop",
            Self::Coherent(Coherent::HeldOff { .. }) => "coherent: No Snoop is held off",
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
                "refused: the device can go behind the CPU caches and --no-snoop=refuse was given; \
                 use an IOMMU that enforces snooping, or --no-snoop=suppress"
            }
            Self::DirectRings => {
                "refused: the device can go behind the CPU caches, and nobody would flush the guest's rings; \
                 use an IOMMU that enforces snooping, or serve the device as vhost-user-blk"
            }
            Self::NoShim => {
                "refused: the device can go behind the CPU caches, and KVM cannot be told to let the guest flush them; \
                 start QEMU with the shim preloaded and give --kvm-socket"
            }
            Self::NoCacheOps => {
                "refused: the device can go behind the CPU caches, and this CPU gives programs no cache-line operations; \
                 use an IOMMU that enforces snooping"
            }
        })
    }
}

#[cfg(test)]
mod tests;
