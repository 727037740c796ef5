//! The state that the VMM's threads and the shim's thread share. A vCPU thread never waits, allocates or takes a lock here.
//!
//! ```text
//!   the VMM's threads              Vm                     the shim's thread
//!   vm_created ──────────────►  VMs seen        ──────►  the only VM, or why there is none
//!   vcpu_enters (KVM_RUN) ───►  started         ──────►  the lock
//!   vfio_device ◄────────────►  kvm-vfio device ◄─────►  add, delete
//!   unless_pinned(discard) ──►  pins, discards  ◄──────  pin: waits for discards in progress; unpin
//! ```

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::file;
use crate::kvm::{self, VfioDevice};
use crate::registry::VmOps;
use crate::wire::{Reason, Refusal};

/// How long a registration waits for a discard in progress. A hole of a few GiB takes milliseconds.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);

/// The VM of this process, which may not exist yet. Meant to be a `static`.
#[derive(Debug)]
pub struct Vm {
    /// Descriptors on which a VM was seen; -1: free. Some VMMs briefly create a second VM to probe processor features.
    seen: [AtomicI32; 8],
    /// First entry of a vCPU into the guest, milliseconds since 1970, 0: none yet.
    started_ms: AtomicU64,
    /// Devices that can access guest memory.
    pins: AtomicU32,
    /// Discards in progress, or about to check `pins`.
    discards: AtomicU32,
    /// The kvm-vfio device, and the VM it belongs to. Locked for the time of an ioctl, never by a vCPU thread.
    device: Mutex<Option<(RawFd, VfioDevice)>>,
}

impl Default for Vm {
    fn default() -> Self {
        Self::new()
    }
}

impl Vm {
    /// Starts without a VM.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            seen: [const { AtomicI32::new(-1) }; 8],
            started_ms: AtomicU64::new(0),
            pins: AtomicU32::new(0),
            discards: AtomicU32::new(0),
            device: Mutex::new(None),
        }
    }

    /// Call this when `KVM_CREATE_VM` has returned `vm`.
    pub fn vm_created(&self, vm: RawFd) {
        // The kvm-vfio device of a closed VM would keep that VM alive.
        let stale = |(of, _): &mut (RawFd, VfioDevice)| *of == vm || !kvm::takes_vfio(*of);
        drop(self.device.lock().unwrap_or_else(PoisonError::into_inner).take_if(stale));
        let known = self.seen.iter().any(|slot| slot.load(Ordering::Acquire) == vm);
        // The slot of a closed VM is free as well.
        let free = |slot: &&AtomicI32| !kvm::takes_vfio(slot.load(Ordering::Acquire));
        if let (false, Some(slot)) = (known, self.seen.iter().find(free)) {
            slot.store(vm, Ordering::Release);
        }
    }

    /// Call this before every `KVM_RUN`, or before the first one.
    #[inline]
    pub fn vcpu_enters(&self) {
        if self.started_ms.load(Ordering::Relaxed) == 0 {
            self.first_entry();
        }
    }

    #[cold]
    fn first_entry(&self) {
        let since_1970 = SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_millis());
        let now = u64::try_from(since_1970).unwrap_or(1).max(1);
        // Several vCPUs may enter at once; only the first one's time is stored.
        _ = self.started_ms.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// A descriptor of the VM's kvm-vfio device for the VMM's own use. Creates the device if there is none.
    ///
    /// # Errors
    /// The errno of `KVM_CREATE_DEVICE` or of duplicating the descriptor.
    pub fn vfio_device(&self, vm: RawFd) -> io::Result<OwnedFd> {
        self.with_device(vm, VfioDevice::share)
    }

    /// Hands the shim the kvm-vfio device that the VMM has created for `vm`. Not needed for one from [`Self::vfio_device`].
    pub fn adopt_device(&self, vm: RawFd, device: OwnedFd) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = Some((vm, VfioDevice::adopt(device)));
    }

    /// Runs `discard`, for example to punch a hole into guest memory. Returns `None` without running it if a device can access
    /// guest memory: the device would keep using the old pages.
    pub fn unless_pinned<T>(&self, discard: impl FnOnce() -> T) -> Option<T> {
        struct DiscardGuard<'a>(&'a AtomicU32);
        impl Drop for DiscardGuard<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        // Counted before the check: either the check sees the pin, or `pin` waits for this discard.
        self.discards.fetch_add(1, Ordering::SeqCst);
        let _guard = DiscardGuard(&self.discards);
        (!self.pinned()).then(discard)
    }

    /// True while a device can access guest memory.
    #[must_use]
    pub fn pinned(&self) -> bool {
        self.pins.load(Ordering::SeqCst) > 0
    }

    fn live_vms(&self) -> impl Iterator<Item = RawFd> {
        self.seen.iter().map(|slot| slot.load(Ordering::Acquire)).filter(|&vm| vm >= 0 && kvm::takes_vfio(vm))
    }

    /// The only VM.
    fn single_vm(&self) -> Result<RawFd, Reason> {
        let mut live = self.live_vms();
        match (live.next(), live.next()) {
            (Some(vm), None) => Ok(vm),
            (None, _) => Err(Reason::NoVm),
            (Some(_), Some(_)) => Err(Reason::MultipleVms),
        }
    }

    fn with_device<T>(&self, vm: RawFd, action: impl FnOnce(&VfioDevice) -> io::Result<T>) -> io::Result<T> {
        let mut slot = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some((of, device)) if *of == vm => action(device),
            _ => action(&slot.insert((vm, VfioDevice::create(vm)?)).1),
        }
    }

    fn with_single_device(&self, action: impl FnOnce(&VfioDevice) -> io::Result<()>) -> Result<(), Refusal> {
        let refused =
            |error: io::Error| Refusal { reason: Reason::Kvm, errno: error.raw_os_error().unwrap_or(libc::EIO) };
        self.with_device(self.single_vm()?, action).map_err(refused)
    }
}

impl VmOps for Vm {
    fn vms(&self) -> u16 {
        self.live_vms().map(|_| 1).sum()
    }

    fn started_ms(&self) -> u64 {
        self.started_ms.load(Ordering::SeqCst)
    }

    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        file::check(file)?;
        self.with_single_device(|device| device.add(file))
    }

    fn delete(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.with_single_device(|device| device.delete(file))
    }

    fn pin(&self) -> Result<(), Refusal> {
        self.pins.fetch_add(1, Ordering::SeqCst);
        let deadline = Instant::now() + DISCARD_TIMEOUT;
        while self.discards.load(Ordering::SeqCst) > 0 {
            if Instant::now() > deadline {
                self.unpin();
                return Err(Reason::DiscardPending.into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, AsRawFd};
    use std::sync::mpsc;

    #[test]
    fn a_discard_runs_only_while_nothing_is_pinned() {
        let vm = Vm::new();
        assert_eq!(vm.unless_pinned(|| 1), Some(1));
        vm.pin().unwrap();
        assert_eq!(vm.unless_pinned(|| 1), None);
        vm.unpin();
        assert_eq!(vm.unless_pinned(|| 1), Some(1));
    }

    #[test]
    fn a_pin_waits_for_a_discard_in_progress() {
        let vm = Vm::new();
        let (begun, has_begun) = mpsc::channel();
        let (end, may_end) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let long_discard = move || (begun.send(()).unwrap(), may_end.recv().unwrap());
            let discard = scope.spawn(|| vm.unless_pinned(long_discard).map(|_| ()));
            has_begun.recv().unwrap();
            let pin = scope.spawn(|| vm.pin().map(|()| vm.discards.load(Ordering::SeqCst)));
            while !vm.pinned() {
                std::thread::yield_now();
            }
            end.send(()).unwrap();
            assert_eq!(discard.join().unwrap(), Some(()), "it was in progress");
            assert_eq!(pin.join().unwrap(), Ok(0), "no discard is in progress");
        });
    }

    #[test]
    fn a_failed_pin_leaves_nothing_behind() {
        let vm = Vm::new();
        vm.discards.store(1, Ordering::SeqCst);
        assert_eq!(vm.pin(), Err(Reason::DiscardPending.into()));
        assert!(!vm.pinned());
    }

    #[test]
    fn the_time_of_the_first_entry_is_kept() {
        let vm = Vm::new();
        assert_eq!(vm.started_ms(), 0);
        vm.vcpu_enters();
        let first = vm.started_ms();
        assert!(first > 0);
        vm.started_ms.store(5, Ordering::SeqCst);
        vm.vcpu_enters();
        assert_eq!(vm.started_ms(), 5);
    }

    #[test]
    fn a_descriptor_that_is_not_a_vm_is_not_counted() {
        let vm = Vm::new();
        assert_eq!((vm.vms(), vm.single_vm()), (0, Err(Reason::NoVm)));
        vm.vm_created(0);
        assert_eq!(vm.vms(), 0, "descriptor 0 is not a VM");
    }

    #[test]
    fn the_vmm_and_the_shim_share_one_vfio_device_in_either_order() {
        for vmm_first in [true, false] {
            let Some(descriptor) = kvm::tests::create_vm() else { return println!("no /dev/kvm here: not tested") };
            let (vm, raw) = (Vm::new(), descriptor.as_raw_fd());
            vm.vm_created(raw);
            let not_vfio = std::fs::File::open("/dev/null").unwrap();

            let of_vmm = vmm_first.then(|| vm.vfio_device(raw).unwrap());
            // KVM itself refuses a file that it does not hold: so the device exists.
            let refusal = vm.delete(not_vfio.as_fd()).unwrap_err();
            let of_vmm = of_vmm.map_or_else(|| vm.vfio_device(raw), Ok);

            assert_eq!(refusal.reason, Reason::Kvm);
            assert!(of_vmm.is_ok());
            let another = VfioDevice::create(raw).unwrap_err();
            assert_eq!(another.raw_os_error(), Some(libc::EBUSY), "the VM has one");
        }
    }

    #[test]
    fn a_closed_vm_is_not_kept_alive_by_its_vfio_device() {
        let Some(first) = kvm::tests::create_vm() else { return println!("no /dev/kvm here: not tested") };
        let vm = Vm::new();
        vm.vm_created(first.as_raw_fd());
        drop(vm.vfio_device(first.as_raw_fd()).unwrap());
        drop(first);

        let second = kvm::tests::create_vm().unwrap();
        vm.vm_created(second.as_raw_fd());

        assert!(vm.device.lock().unwrap().is_none());
        assert_eq!(vm.single_vm(), Ok(second.as_raw_fd()));
    }
}
