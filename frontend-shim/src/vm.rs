//! What the VMM and the shim know of each other. The VMM's threads write facts here as they pass, the shim's thread reads
//! them; a vCPU thread never waits, allocates or takes a lock.
//!
//! ```text
//!   the VMM's threads              Vm                     the shim's thread
//!   vm_created ──────────────►  VMs seen        ──────►  the one that lives, or why there is none
//!   vcpu_enters (KVM_RUN) ───►  started         ──────►  the lock
//!   vfio_device ◄────────────►  kvm-vfio device ◄─────►  add, delete
//!   unless_pinned(discard) ──►  pins, discards  ◄──────  pin: waits for discards that have begun; unpin
//! ```

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::file;
use crate::kvm::{self, VfioDevice};
use crate::registry::Machine;
use crate::wire::{Reason, Refusal};

/// How long a discard that has begun may keep a registration waiting. A hole in a few GiB takes milliseconds.
const DISCARD_PATIENCE: Duration = Duration::from_secs(2);

/// One process that has, or will have, a VM. Made to be a `static`.
#[derive(Debug)]
pub struct Vm {
    /// Descriptors on which a VM was seen, -1: free. Some VMMs make a second one for a moment, to probe processor features.
    seen: [AtomicI32; 8],
    /// First entry of a vCPU into the guest, milliseconds since 1970, 0: none yet.
    started_ms: AtomicU64,
    /// Devices that reach guest memory.
    pins: AtomicU32,
    /// Discards that have passed the check and may not have ended.
    discards: AtomicU32,
    /// The kvm-vfio device, and the VM it belongs to. Held for an ioctl's time, never where a vCPU runs.
    device: Mutex<Option<(RawFd, VfioDevice)>>,
}

impl Default for Vm {
    fn default() -> Self {
        Self::new()
    }
}

impl Vm {
    /// Nothing seen yet.
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

    /// The VMM has made a VM: `KVM_CREATE_VM` returned `vm`.
    pub fn vm_created(&self, vm: RawFd) {
        // The device of a VM that was closed would keep that VM alive.
        let gone = |(of, _): &mut (RawFd, VfioDevice)| *of == vm || !kvm::takes_vfio(*of);
        drop(self.device.lock().unwrap_or_else(PoisonError::into_inner).take_if(gone));
        let known = self.seen.iter().any(|slot| slot.load(Ordering::Acquire) == vm);
        // When all slots are taken, those of VMs that have gone are free again.
        let free = |slot: &&AtomicI32| !kvm::takes_vfio(slot.load(Ordering::Acquire));
        if let (false, Some(slot)) = (known, self.seen.iter().find(free)) {
            slot.store(vm, Ordering::Release);
        }
    }

    /// A vCPU is about to enter the guest: called before every `KVM_RUN`, or before the first.
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
        // Several vCPUs may come at once; the first one's time stays.
        _ = self.started_ms.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// The VM's kvm-vfio device, for the VMM's own use: made now, or another descriptor of the one there is.
    ///
    /// # Errors
    /// The errno of `KVM_CREATE_DEVICE` or of duplicating a descriptor.
    pub fn vfio_device(&self, vm: RawFd) -> io::Result<OwnedFd> {
        self.with_device(vm, VfioDevice::share)
    }

    /// Tells the shim of the kvm-vfio device that the VMM has made for `vm`. Needless for one from [`Self::vfio_device`].
    pub fn adopt_device(&self, vm: RawFd, device: OwnedFd) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = Some((vm, VfioDevice::adopt(device)));
    }

    /// Runs `discard` (a hole punched into guest memory, say) unless a device reaches guest memory: then the pages must
    /// stay, since the device would go on using the old ones, and `None` is returned.
    pub fn unless_pinned<T>(&self, discard: impl FnOnce() -> T) -> Option<T> {
        struct Announced<'a>(&'a AtomicU32);
        impl Drop for Announced<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        // Before the check, so that `pin` either is seen here or waits for this discard.
        self.discards.fetch_add(1, Ordering::SeqCst);
        let _until_done = Announced(&self.discards);
        (!self.pinned()).then(discard)
    }

    /// True while a device reaches guest memory.
    #[must_use]
    pub fn pinned(&self) -> bool {
        self.pins.load(Ordering::SeqCst) > 0
    }

    fn living(&self) -> impl Iterator<Item = RawFd> {
        self.seen.iter().map(|slot| slot.load(Ordering::Acquire)).filter(|&vm| vm >= 0 && kvm::takes_vfio(vm))
    }

    /// The one VM that lives.
    fn only_one(&self) -> Result<RawFd, Reason> {
        let mut living = self.living();
        match (living.next(), living.next()) {
            (Some(vm), None) => Ok(vm),
            (None, _) => Err(Reason::NoVm),
            (Some(_), Some(_)) => Err(Reason::SeveralVms),
        }
    }

    fn with_device<T>(&self, vm: RawFd, use_it: impl FnOnce(&VfioDevice) -> io::Result<T>) -> io::Result<T> {
        let mut slot = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some((of, device)) if *of == vm => use_it(device),
            _ => use_it(&slot.insert((vm, VfioDevice::create(vm)?)).1),
        }
    }

    fn with_only_device(&self, use_it: impl FnOnce(&VfioDevice) -> io::Result<()>) -> Result<(), Refusal> {
        let refused =
            |error: io::Error| Refusal { reason: Reason::Kvm, errno: error.raw_os_error().unwrap_or(libc::EIO) };
        self.with_device(self.only_one()?, use_it).map_err(refused)
    }
}

impl Machine for Vm {
    fn vms(&self) -> u16 {
        self.living().map(|_| 1).sum()
    }

    fn started_ms(&self) -> u64 {
        self.started_ms.load(Ordering::SeqCst)
    }

    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        file::check(file)?;
        self.with_only_device(|device| device.add(file))
    }

    fn delete(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.with_only_device(|device| device.delete(file))
    }

    fn pin(&self) -> Result<(), Refusal> {
        self.pins.fetch_add(1, Ordering::SeqCst);
        let deadline = Instant::now() + DISCARD_PATIENCE;
        while self.discards.load(Ordering::SeqCst) > 0 {
            if Instant::now() > deadline {
                self.unpin();
                return Err(Reason::DiscardRuns.into());
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
    fn a_pin_waits_for_a_discard_that_has_begun() {
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
            assert_eq!(discard.join().unwrap(), Some(()), "it had begun");
            assert_eq!(pin.join().unwrap(), Ok(0), "none runs any more");
        });
    }

    #[test]
    fn a_pin_that_cannot_be_had_leaves_nothing_behind() {
        let vm = Vm::new();
        vm.discards.store(1, Ordering::SeqCst);
        assert_eq!(vm.pin(), Err(Reason::DiscardRuns.into()));
        assert!(!vm.pinned());
    }

    #[test]
    fn the_first_entry_is_the_one_remembered() {
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
    fn a_descriptor_that_is_no_vm_is_none() {
        let vm = Vm::new();
        assert_eq!((vm.vms(), vm.only_one()), (0, Err(Reason::NoVm)));
        vm.vm_created(0);
        assert_eq!(vm.vms(), 0, "descriptor 0 is no VM");
    }

    #[test]
    fn the_vmm_and_the_shim_share_one_vfio_device_whoever_comes_first() {
        for vmm_first in [true, false] {
            let Some(descriptor) = kvm::tests::create_vm() else { return println!("no /dev/kvm here: not tested") };
            let (vm, raw) = (Vm::new(), descriptor.as_raw_fd());
            vm.vm_created(raw);
            let not_vfio = std::fs::File::open("/dev/null").unwrap();

            let of_vmm = vmm_first.then(|| vm.vfio_device(raw).unwrap());
            // KVM's own answer to a file it does not hold, or cannot: the device is there and was asked.
            let refusal = vm.delete(not_vfio.as_fd()).unwrap_err();
            let of_vmm = of_vmm.map_or_else(|| vm.vfio_device(raw), Ok);

            assert_eq!(refusal.reason, Reason::Kvm);
            assert!(of_vmm.is_ok());
            let another = VfioDevice::create(raw).unwrap_err();
            assert_eq!(another.raw_os_error(), Some(libc::EBUSY), "KVM has the one");
        }
    }

    #[test]
    fn a_vm_that_was_closed_is_not_kept_alive_by_its_vfio_device() {
        let Some(first) = kvm::tests::create_vm() else { return println!("no /dev/kvm here: not tested") };
        let vm = Vm::new();
        vm.vm_created(first.as_raw_fd());
        drop(vm.vfio_device(first.as_raw_fd()).unwrap());
        drop(first);

        let second = kvm::tests::create_vm().unwrap();
        vm.vm_created(second.as_raw_fd());

        assert!(vm.device.lock().unwrap().is_none());
        assert_eq!(vm.only_one(), Ok(second.as_raw_fd()));
    }
}
