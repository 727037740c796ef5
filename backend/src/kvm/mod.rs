//! Registers the device with the process that runs the VM. KVM must be told of non-coherent DMA by that process, and only that
//! process can block discards of guest memory. The shim preloaded into it (`kvm-vfio-shim`) listens at `--kvm-socket`.
//!
//! ```text
//! first message of a front-end ─ HELLO; again with each message, until the shim answers or memory must be mapped
//!                              ─ REGISTER, as the verdict requires
//!                              ─ memory is mapped … the front-end leaves, all memory is unmapped ─ UNREGISTER
//! ```
//!
//! QEMU connects before it creates its VM, so the shim does not listen yet. It sends its first message before a vCPU runs: the
//! shim listens then, and KVM can still be told. It shares memory when the guest's driver starts, which is too late.
//!
//! The registration lasts as long as the front-end, whatever happens to its memory. QEMU moves a region by removing and
//! adding it, and KVM's answer must not change meanwhile. It ends early if the host takes the device back, because the host's
//! driver waits until every file of the device is closed.
//!
//! | at the socket                      | coherent verdict               | flushing verdict                           |
//! |------------------------------------|--------------------------------|--------------------------------------------|
//! | a shim that accepts                | discards blocked               | discards blocked, KVM is told              |
//! | a shim in a process without KVM VM | discards blocked               | discards blocked, there is no KVM to tell  |
//! | a shim that refuses                | served, a warning, monitored   | **memory is refused**, with the reason     |
//! | no shim, or none that can be used  | served, a warning, monitored   | the same, KVM is not told                  |
//! | a shim that disconnects            | tried once more, then as no shim | the same                                 |
//!
//! *Monitored*: see `discard_monitor.rs`. *None that can be used*: no answer in time, another version, or another user's. If the
//! device cannot be served unless KVM is told, memory is refused in each of these cases.
//!
//! Why a refusal counts more than no shim: without a shim, the owner of the VM accepts KVM's default answer, and this process
//! flushes anyway. With a shim, the owner wants KVM's answer to be true and, under the lock policy, to stay what the guest has
//! seen. Serving after a refusal would make the answer wrong, and only this process would know.

mod discard_monitor;
mod second_file;
mod shim_link;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kvm_vfio_shim::{Refused, Status};

pub(crate) use discard_monitor::DiscardMonitor;
pub use second_file::SecondFile;
pub(crate) use shim_link::ShimLink;

use crate::coherency::{Facts, Refusal, Verdict, decide};
use crate::rate_limited_log::{Limit, SharedLog};

/// The process that runs the VM.
pub struct Vmm {
    shim: Option<Shim>,
    /// The shim's socket of the VM that is served now, if it is not that of `shim`.
    moved_to: Mutex<Option<PathBuf>>,
    registrations: Mutex<RegistrationStatistics>,
    /// The host has the device back, for good: there is nothing left to register or to monitor.
    released: AtomicBool,
    /// What front-ends cause by connecting.
    log: SharedLog,
}

/// The shim's socket, and the device to register with it.
#[derive(Clone, Debug)]
pub struct Shim {
    /// `--kvm-socket`.
    pub socket: PathBuf,
    /// The device's name, for the log.
    pub device: String,
    /// The facts behind the verdict; `shim` is replaced according to what is found at the socket.
    pub facts: Facts,
    /// The VFIO device file, opened a second time. `None` for an emulated device: KVM cannot be told of it and need not be, since
    /// its DMA is loads and stores of this process.
    pub file: Option<SecondFile>,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegistrationStatistics {
    /// Registrations that a shim accepted.
    pub registrations: u64,
    /// Those of them that told KVM of non-coherent DMA.
    pub told: u64,
    /// Registrations that a shim refused, or that failed at the device file.
    pub refusals: u64,
    /// Memory files of which memory was discarded.
    pub alarms: u64,
    /// The shim's last answer; `None` while there is no shim.
    pub last: Option<Status>,
}

/// Why memory may not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// The shim refused.
    #[error(
        "{device}: KVM must be told of its non-coherent DMA before memory is mapped, and the VM's KVM shim refuses: {refused}; \
         or omit --kvm-socket, to serve without telling KVM"
    )]
    Refused {
        /// The device.
        device: String,
        /// The reason.
        refused: Refused,
    },
    /// The device file that KVM must be given cannot be opened.
    #[error("{device}: KVM must be told of its non-coherent DMA before memory is mapped; open {file}: {source}")]
    File {
        /// The device.
        device: String,
        /// Its file.
        file: String,
        /// The errno.
        source: io::Error,
    },
    /// The device cannot be served without a shim.
    #[error("{0}: {1}")]
    Verdict(String, Refusal),
}

impl Vmm {
    /// Without `--kvm-socket`: the device is not registered.
    #[must_use]
    pub fn without_shim() -> Self {
        let log = SharedLog::with_limit(module_path!(), Limit::CONNECTIONS);
        let (registrations, moved_to) = (Mutex::default(), Mutex::default());
        Self { shim: None, moved_to, registrations, released: AtomicBool::new(false), log }
    }

    /// A process with a shim, which listens as soon as the VM exists.
    #[must_use]
    pub fn with_shim(shim: Shim) -> Self {
        Self { shim: Some(shim), ..Self::without_shim() }
    }

    /// True if the device is registered with the VM's process.
    pub(crate) fn registers(&self) -> bool {
        self.shim.is_some()
    }

    /// The shim of the VM that is served now, or that of the next VM at `next`.
    fn shim(&self, next: Option<PathBuf>) -> Option<Shim> {
        let socket = next.or_else(|| self.moved_to.lock().unwrap_or_else(PoisonError::into_inner).clone());
        self.shim.clone().map(|shim| Shim { socket: socket.unwrap_or(shim.socket.clone()), ..shim })
    }

    /// The VM whose shim listens at `socket` is the one that is served now.
    fn move_to(&self, socket: &Path) {
        *self.moved_to.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket.to_owned());
    }

    /// Counters since the start.
    #[must_use]
    pub fn registrations(&self) -> RegistrationStatistics {
        *self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut RegistrationStatistics)) {
        change(&mut self.registrations.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The host has the device back. With a shim this is for good: KVM would have to be told of the device again before any
    /// memory is mapped.
    pub(crate) fn release(&self) {
        if let Some(shim) = &self.shim {
            log::warn!("{}: the host keeps the device; restart this program to serve it again", shim.device);
            self.released.store(true, Ordering::Relaxed);
        }
    }

    /// True if the host has the device back for good.
    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::Relaxed)
    }

    /// Counts a memory file of which memory was discarded.
    pub(crate) fn alarmed(&self) {
        self.count(|registrations| registrations.alarms += 1);
    }
}

impl Shim {
    /// The verdict if the shim is `present`, or is not.
    fn verdict(&self, present: bool) -> Verdict {
        decide(&Facts { shim: present, ..self.facts })
    }

    /// True if the device can be served even if KVM is not told.
    fn serves_without_kvm(&self) -> bool {
        !matches!(self.verdict(false), Verdict::Refuse(_))
    }

    /// True if KVM must be told of non-coherent DMA.
    fn must_tell_kvm(&self) -> bool {
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

/// A shim's status, as text.
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
        (0, false) => "assumes coherent DMA".to_owned(),
        (0, true) => "still knows of non-coherent DMA, of a device that is gone".to_owned(),
        (told, _) => format!("knows of non-coherent DMA, of {told} device(s)"),
    };
    let Status { vmm_pid, policy, registered, .. } = status;
    format!("process {vmm_pid}, {vm}, policy {policy}; {registered} device(s) registered; KVM {kvm}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_of_a_vm_has_its_own_text() {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
        let running = u64::try_from(now).unwrap() - 90_000;
        let states = [
            (Status::default(), "no KVM VM, policy lock; 0 device(s) registered; KVM assumes coherent DMA"),
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
    fn the_statistics_show_the_state_of_kvm() {
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
