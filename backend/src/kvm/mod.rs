//! What the process that runs the VM must hear of this device, and what is done where it does not. KVM takes such news from
//! that process alone, and only that process can leave guest memory where it is. The shim inside it (`kvm-vfio-shim`)
//! listens at `--kvm-socket`.
//!
//! ```text
//! a front-end's first message ─ HELLO; again with each message until somebody answers, or memory is to be mapped
//!                             ─ REGISTER, as the verdict asks
//!                             ─ memory is mapped … the front-end leaves, the last of it is unmapped ─ UNREGISTER
//! ```
//!
//! QEMU connects before it makes its VM, so then there is no shim yet; it says its first word before a vCPU runs, so then there
//! is, and KVM can still be told; memory it shares when the guest's driver starts, which is too late for that.
//!
//! The registration stays while the front-end does, whatever becomes of its memory in between: QEMU moves a region by
//! removing and adding it, and KVM should not change its mind over that. It ends early if the host takes the device back, whose
//! driver waits for every open file of it.
//!
//! | found at the socket              | coherent verdict            | flushing verdict                        |
//! |----------------------------------|-----------------------------|-----------------------------------------|
//! | a shim that agrees               | memory is kept              | memory is kept, KVM is told             |
//! | one whose process has no KVM VM  | memory is kept              | memory is kept, there is no KVM to tell |
//! | one that says no                 | served, a warning, watched  | **memory is refused**, with its reason  |
//! | nobody, or nobody to talk with   | served, a warning, watched  | the same, KVM is not told               |
//! | one that goes while it is needed | asked once more, then as if nobody was there | the same               |
//!
//! *Kept*: discards of guest memory have no effect. *Watched*: see `discard_monitor.rs`. *Nobody to talk with*: no answer in time,
//! another version, another user's. A service that cannot do without KVM is refused memory in each of these cases.
//!
//! Why a shim that says no weighs more than none: without one, the owner of the VM has left KVM's answer as it is, and this
//! process flushes all the same. With one, the owner wants the answer to be true and, by the lock, to stay what the guest
//! has seen. Serving then would make it false, and no one but this process would know.

mod discard_monitor;
mod shim_link;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kvm_vfio_shim::{Refused, Status};

pub(crate) use discard_monitor::DiscardMonitor;
pub(crate) use shim_link::ShimLink;

use crate::coherency::{Facts, Refusal, Verdict, decide};

/// The process that runs the VM, as far as it can be reached.
pub struct Vmm {
    shim: Option<Shim>,
    registrations: Mutex<RegistrationStatistics>,
    /// The host has got the device back: there is nothing to tell, to keep or to watch any more.
    released: AtomicBool,
}

/// Where the shim listens, and what it is to hear.
#[derive(Clone, Debug)]
pub struct Shim {
    /// `--kvm-socket`.
    pub socket: PathBuf,
    /// The device's name, for the log.
    pub device: String,
    /// What the verdict rests on; whether there is a shim is found out here.
    pub facts: Facts,
    /// The device's own file, for a second open that is never bound; `None` for a device that VFIO does not know, of which
    /// KVM cannot be told and need not be: its DMA is this process's own loads and stores.
    pub file: Option<PathBuf>,
}

/// What has come of it since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegistrationStatistics {
    /// Registrations that a shim took.
    pub registrations: u64,
    /// Those among them of which KVM was told.
    pub told: u64,
    /// Times that a shim said no.
    pub refusals: u64,
    /// Alarms about discarded memory.
    pub alarms: u64,
    /// What the shim said last; `None` while there is none.
    pub last: Option<Status>,
}

/// Why memory may not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// The shim said no.
    #[error(
        "KVM must be told before memory is mapped that {device} goes behind the CPU caches, and the VM's KVM shim refuses: {refused}; or leave --kvm-socket out, to serve without telling KVM"
    )]
    Refused {
        /// The device.
        device: String,
        /// Why.
        refused: Refused,
    },
    /// There is nothing to tell KVM with.
    #[error("KVM must be told before memory is mapped that {device} goes behind the CPU caches; open {}: {source}", file.display())]
    File {
        /// The device.
        device: String,
        /// Its file.
        file: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// Without a shim there is no service of this kind.
    #[error("{0}: {1}")]
    Verdict(String, Refusal),
}

impl Vmm {
    /// One that nothing can be told.
    #[must_use]
    pub fn without_shim() -> Self {
        Self { shim: None, registrations: Mutex::default(), released: AtomicBool::new(false) }
    }

    /// One in which a shim listens, or will when the VM is there.
    #[must_use]
    pub fn with_shim(shim: Shim) -> Self {
        Self { shim: Some(shim), ..Self::without_shim() }
    }

    /// What has come of it since the start.
    #[must_use]
    pub fn registrations(&self) -> RegistrationStatistics {
        *self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut RegistrationStatistics)) {
        change(&mut self.registrations.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The host has got the device back. With a shim that is for good: KVM would have to be told before it returns.
    pub(crate) fn release(&self) {
        if let Some(shim) = &self.shim {
            log::warn!("{}: it stays with the host; restart this program to serve it again", shim.device);
            self.released.store(true, Ordering::Relaxed);
        }
    }

    /// True from then on, if it is for good.
    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::Relaxed)
    }

    /// Guest memory is found to have been discarded.
    pub(crate) fn alarmed(&self) {
        self.count(|registrations| registrations.alarms += 1);
    }
}

impl Shim {
    /// The verdict with or without this shim.
    fn verdict(&self, present: bool) -> Verdict {
        decide(&Facts { shim: present, ..self.facts })
    }

    /// True if the device is served though KVM does not know of it.
    fn serves_untold(&self) -> bool {
        !matches!(self.verdict(false), Verdict::Refuse(_))
    }

    /// True if KVM is to be told.
    fn tells_kvm(&self) -> bool {
        self.file.is_some() && matches!(self.verdict(true), Verdict::Flush(flush) if flush.tell_kvm)
    }
}

/// For the statistics line.
impl fmt::Display for RegistrationStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kvm = match self.last {
            None => "unknown",
            Some(status) if status.kept => "kept",
            Some(status) if status.told > 0 => "non-coherent",
            Some(_) => "coherent",
        };
        let Self { registrations, told, refusals, alarms, .. } = self;
        write!(f, "kvm={kvm} registrations={registrations} told={told} refused={refusals} discard_alarms={alarms}")
    }
}

/// A shim's account of its VM, in words.
#[must_use]
pub fn describe(status: &Status) -> String {
    let vm = match (status.vms, status.started_ms) {
        (0, _) => "no KVM VM".to_owned(),
        (1, 0) => "VM not started yet".to_owned(),
        (1, started) => {
            let since = SystemTime::UNIX_EPOCH + Duration::from_millis(started);
            format!("VM running for {} s", since.elapsed().unwrap_or_default().as_secs())
        }
        (several, _) => format!("{several} VMs"),
    };
    let kvm = match (status.told, status.kept) {
        (0, false) => "takes DMA for coherent".to_owned(),
        (0, true) => "still knows of non-coherent DMA, of a device that has gone".to_owned(),
        (told, _) => format!("knows of non-coherent DMA, of {told} device(s)"),
    };
    let Status { vmm_pid, policy, registered, .. } = status;
    format!("process {vmm_pid}, {vm}, policy {policy}; {registered} device(s) registered; KVM {kvm}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_of_a_vm_reads_differently() {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
        let running = u64::try_from(now).unwrap() - 90_000;
        let states = [
            (Status::default(), "no KVM VM, policy lock; 0 device(s) registered; KVM takes DMA for coherent"),
            (Status { vms: 1, ..Status::default() }, "VM not started yet"),
            (Status { vms: 1, started_ms: running, ..Status::default() }, "VM running for 90 s"),
            (Status { vms: 2, ..Status::default() }, "2 VMs"),
            (Status { vms: 1, told: 2, ..Status::default() }, "knows of non-coherent DMA, of 2 device(s)"),
            (Status { vms: 1, kept: true, ..Status::default() }, "still knows of non-coherent DMA"),
        ];
        for (status, part) in states {
            let text = describe(&status);
            assert!(text.contains(part), "{part} in: {text}");
        }
    }

    #[test]
    fn the_statistics_name_kvms_state() {
        let last = |told, kept| RegistrationStatistics {
            last: Some(Status { told, kept, ..Status::default() }),
            ..RegistrationStatistics::default()
        };
        let states = [
            (RegistrationStatistics::default(), "kvm=unknown registrations=0 told=0 refused=0 discard_alarms=0"),
            (last(0, false), "kvm=coherent "),
            (last(1, false), "kvm=non-coherent "),
            (last(0, true), "kvm=kept "),
        ];
        for (registrations, part) in states {
            assert!(registrations.to_string().starts_with(part), "{part} in: {registrations}");
        }
    }
}
