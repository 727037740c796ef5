//! The text of a refusal: what was requested, what was found, and the fix. The VMM's log and the backend's use the same text.

use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};

use crate::wire::{Reason, Refusal, Status};

/// A refusal together with the state that explains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub refusal: Refusal,
    /// The shim's state at that time.
    pub status: Status,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errno = io::Error::from_raw_os_error(self.refusal.errno);
        match self.refusal.reason {
            Reason::Malformed => f.write_str("malformed message, or wrong number of descriptors with it"),
            Reason::Version => f.write_str("it speaks another version of the shim's protocol; install both from one release"),
            Reason::HelloFirst => f.write_str("HELLO must come first"),
            Reason::WrongUser => f.write_str(
                "this user may not use the VM's shim; pass its uid to the VMM in KVM_VFIO_SHIM_UID, or run both as one user",
            ),
            Reason::LimitReached => f.write_str("all connections or registrations of the VM's shim are in use"),
            Reason::NoVm => f.write_str(
                "the VMM has no KVM VM (TCG, or too early), or its kernel was built without CONFIG_KVM_VFIO; start it with -accel kvm",
            ),
            Reason::MultipleVms => {
                write!(f, "the VMM's process has {} VMs, and the shim supports one VM per process", self.status.vms)
            }
            Reason::Locked => write!(
                f,
                "the VM has been running for {:?} and its policy is `{}`, so KVM's answer on non-coherent DMA can no longer \
                 change; start the backend before the VM starts, or start the VMM with KVM_VFIO_SHIM_POLICY=dynamic",
                self.running_for(),
                self.status.policy,
            ),
            Reason::NotVfio => f.write_str("the descriptor is neither a VFIO device nor a VFIO group"),
            Reason::Bound => f.write_str(
                "the descriptor is bound to an iommufd, and KVM would keep the device and its pinned memory after its owner \
                 has ended; send a second open of the device's file, never bound",
            ),
            Reason::Kvm => write!(f, "KVM refuses the file: {errno}"),
            Reason::NoSuchHandle => f.write_str("no registration of this connection has that handle"),
            Reason::DiscardPending => f.write_str("a discard of guest memory is still in progress; try again"),
            Reason::RateLimited => f.write_str("too many requests in too short a time"),
            Reason::Other(number) => write!(f, "reason {number}, unknown to this version: {errno}"),
        }
    }
}

impl Refused {
    /// Time since a vCPU first entered the guest, in whole seconds.
    fn running_for(&self) -> Duration {
        let started = SystemTime::UNIX_EPOCH + Duration::from_millis(self.status.started_ms);
        Duration::from_secs(started.elapsed().unwrap_or_default().as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_refusal_names_the_policy_the_age_of_the_vm_and_both_fixes() {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
        let status = Status { started_ms: u64::try_from(now).unwrap() - 90_000, ..Status::default() };
        let text = Refused { refusal: Reason::Locked.into(), status }.to_string();
        for part in ["90s", "`lock`", "before the VM starts", "KVM_VFIO_SHIM_POLICY=dynamic"] {
            assert!(text.contains(part), "{part} in: {text}");
        }
    }

    #[test]
    fn an_errno_of_kvm_is_shown() {
        let refusal = Refusal { reason: Reason::Kvm, errno: libc::EEXIST };
        assert!(Refused { refusal, status: Status::default() }.to_string().contains("File exists"));
    }
}
