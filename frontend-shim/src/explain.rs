//! Refusals in words: what was asked, what was found, what helps. The same for the VMM's log and for the backend's.

use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};

use crate::wire::{Reason, Refusal, Status};

/// A refusal together with the state that explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub refusal: Refusal,
    /// How things stood.
    pub status: Status,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errno = io::Error::from_raw_os_error(self.refusal.errno);
        match self.refusal.reason {
            Reason::Malformed => f.write_str("the message, or the number of descriptors with it, is not as the protocol has it"),
            Reason::Version => f.write_str("it speaks another version of the shim's protocol; install both from one release"),
            Reason::HelloFirst => f.write_str("HELLO must come first"),
            Reason::Stranger => f.write_str(
                "this user may not talk to the VM's shim; name its uid to the VMM with KVM_VFIO_SHIM_UID=, or run both as one user",
            ),
            Reason::TooMany => f.write_str("all connections or registrations of the VM's shim are taken"),
            Reason::NoVm => f.write_str(
                "the VMM has no KVM VM (TCG, or too early), or its kernel was built without CONFIG_KVM_VFIO; start it with -accel kvm",
            ),
            Reason::SeveralVms => {
                write!(f, "the VMM's process has {} VMs, so which one is meant cannot be told; one VM per process", self.status.vms)
            }
            Reason::Locked => write!(
                f,
                "the VM has been running for {:?} and its policy is `{}`, so KVM's answer on non-coherent DMA may not change any \
                 more; have the backend running before the VM starts, or start the VMM with KVM_VFIO_SHIM_POLICY=dynamic",
                self.running_for(),
                self.status.policy,
            ),
            Reason::NotVfio => f.write_str("the descriptor is neither a VFIO device's nor a VFIO group's"),
            Reason::Bound => f.write_str(
                "the descriptor is bound to an iommufd, and KVM would keep the device and its pinned memory past its owner's \
                 end; send a second open of the device's file, never bound",
            ),
            Reason::Kvm => write!(f, "KVM refuses the file: {errno}"),
            Reason::NoSuchHandle => f.write_str("no registration of this connection has that handle"),
            Reason::DiscardRuns => f.write_str("a discard of guest memory that had begun before does not end; try again"),
            Reason::Flood => f.write_str("too many requests in too short a time"),
            Reason::Other(number) => write!(f, "reason {number}, which this version does not know: {errno}"),
        }
    }
}

impl Refused {
    /// Since the first entry of a vCPU, in whole seconds.
    fn running_for(&self) -> Duration {
        let started = SystemTime::UNIX_EPOCH + Duration::from_millis(self.status.started_ms);
        Duration::from_secs(started.elapsed().unwrap_or_default().as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_refusal_names_the_policy_the_age_of_the_vm_and_both_ways_out() {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
        let status = Status { started_ms: u64::try_from(now).unwrap() - 90_000, ..Status::default() };
        let text = Refused { refusal: Reason::Locked.into(), status }.to_string();
        for part in ["90s", "`lock`", "before the VM starts", "KVM_VFIO_SHIM_POLICY=dynamic"] {
            assert!(text.contains(part), "{part} in: {text}");
        }
    }

    #[test]
    fn an_errno_of_kvm_survives() {
        let refusal = Refusal { reason: Reason::Kvm, errno: libc::EEXIST };
        assert!(Refused { refusal, status: Status::default() }.to_string().contains("File exists"));
    }
}
