//! All registrations. Each protects guest memory from discards. One for non-coherent DMA also adds its file to the kvm-vfio
//! device, if the lock permits it. When a connection ends, its registrations end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::lock::{Lock, Removal};
use crate::wire::{Dma, Policy, Reason, Refusal, Status};

/// Most registrations of one connection.
const MAX_PER_PEER: usize = 8;
/// Most registrations of all connections.
const MAX_REGISTRATIONS: usize = 64;

/// What the registry needs from the VMM's process: implemented by [`crate::Vm`], and in tests by a fake without KVM.
pub(crate) trait VmOps {
    /// VMs that exist.
    fn vms(&self) -> u16;
    /// When the first vCPU entered the guest, milliseconds since 1970; 0: none has.
    fn started_ms(&self) -> u64;
    /// Adds an unbound VFIO device file or a group file to the kvm-vfio device.
    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Refusal>;
    /// Deletes a file from it.
    fn delete(&self, file: BorrowedFd<'_>) -> Result<(), Refusal>;
    /// Makes discards of guest memory ineffective, from its return to [`Self::unpin`].
    fn pin(&self) -> Result<(), Refusal>;
    /// Undoes one [`Self::pin`].
    fn unpin(&self);
}

/// Identifies a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerId(pub(crate) u64);

struct Registration {
    handle: u64,
    owner: PeerId,
    /// The file that KVM holds, for non-coherent DMA.
    file: Option<OwnedFd>,
}

/// All registrations, and the kept file if there is one.
pub(crate) struct Registry<'a, M: VmOps> {
    vm: &'a M,
    lock: Lock,
    live: Vec<Registration>,
    kept: Option<OwnedFd>,
    last_handle: u64,
}

impl<'a, M: VmOps> Registry<'a, M> {
    pub(crate) fn new(vm: &'a M, policy: Policy) -> Self {
        Self { vm, lock: Lock::new(policy), live: Vec::new(), kept: None, last_handle: 0 }
    }

    fn started(&self) -> bool {
        self.vm.started_ms() != 0
    }

    /// Registers a device before it can access guest memory. Returns the handle.
    pub(crate) fn register(&mut self, owner: PeerId, dma: Dma, file: Option<OwnedFd>) -> Result<u64, Refusal> {
        let own = self.live.iter().filter(|registration| registration.owner == owner).count();
        if own >= MAX_PER_PEER || self.live.len() >= MAX_REGISTRATIONS {
            return Err(Reason::LimitReached.into());
        }
        match (dma, &file) {
            (Dma::Coherent, None) => self.vm.pin()?,
            (Dma::NonCoherent, Some(file)) => {
                self.vm.pin()?;
                self.add_to_kvm(file.as_fd()).inspect_err(|_| self.vm.unpin())?;
            }
            _ => return Err(Reason::Malformed.into()),
        }
        self.last_handle += 1;
        self.live.push(Registration { handle: self.last_handle, owner, file });
        Ok(self.last_handle)
    }

    /// Adds the file to the kvm-vfio device, unless that would change a locked answer.
    fn add_to_kvm(&mut self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.lock.admit(self.started()).map_err(|_| Reason::Locked)?;
        self.vm.add(file)?;
        // A vCPU may have entered the guest since the check above.
        if self.lock.admit(self.started()).is_err() {
            self.vm.delete(file)?;
            return Err(Reason::Locked.into());
        }
        if self.lock.added()
            && let Some(kept) = self.kept.take()
        {
            // A failure is harmless: KVM holds one file too many, and the new one has been added.
            _ = self.vm.delete(kept.as_fd());
        }
        Ok(())
    }

    /// Ends a registration of `owner`.
    pub(crate) fn unregister(&mut self, owner: PeerId, handle: u64) -> Result<(), Refusal> {
        let matches = |registration: &Registration| registration.owner == owner && registration.handle == handle;
        let index = self.live.iter().position(matches).ok_or(Reason::NoSuchHandle)?;
        let registration = self.live.swap_remove(index);
        self.release(registration)
    }

    /// Ends all registrations of a connection that has ended. Returns how many there were.
    pub(crate) fn remove_peer(&mut self, owner: PeerId) -> usize {
        let removed: Vec<_> = self.live.extract_if(.., |registration| registration.owner == owner).collect();
        let count = removed.len();
        for registration in removed {
            // KVM can refuse only if the VM no longer exists, and then KVM has released its files as well.
            _ = self.release(registration);
        }
        count
    }

    fn release(&mut self, registration: Registration) -> Result<(), Refusal> {
        self.vm.unpin();
        let Some(file) = registration.file else { return Ok(()) };
        match self.lock.remove(self.started()) {
            Removal::Delete => self.vm.delete(file.as_fd()),
            Removal::Keep => {
                self.kept = Some(file);
                Ok(())
            }
        }
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            vmm_pid: std::process::id(),
            vms: self.vm.vms(),
            policy: self.lock.policy(),
            started_ms: self.vm.started_ms(),
            registered: u16::try_from(self.live.len()).unwrap_or(u16::MAX),
            told: self.lock.live(),
            kept: self.lock.kept(),
        }
    }
}

impl<M: VmOps> Drop for Registry<'_, M> {
    /// The shim may end before the VM, and nothing else would undo the registrations.
    fn drop(&mut self) {
        while let Some(owner) = self.live.first().map(|registration| registration.owner) {
            self.remove_peer(owner);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::os::fd::AsRawFd;

    const ONE: PeerId = PeerId(1);
    const TWO: PeerId = PeerId(2);

    /// A VM whose KVM accepts every file, unless `refuses` is set.
    #[derive(Default)]
    pub(crate) struct FakeVm {
        pub(crate) started: Cell<bool>,
        starts_during_add: Cell<bool>,
        refuses: Cell<bool>,
        files: RefCell<Vec<i32>>,
        pub(crate) pins: Cell<u32>,
    }

    impl VmOps for FakeVm {
        fn vms(&self) -> u16 {
            1
        }
        fn started_ms(&self) -> u64 {
            u64::from(self.started.get())
        }
        fn add(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
            if self.refuses.get() {
                return Err(Refusal { reason: Reason::Kvm, errno: libc::EINVAL });
            }
            self.started.set(self.started.get() || self.starts_during_add.get());
            self.files.borrow_mut().push(file.as_raw_fd());
            Ok(())
        }
        fn delete(&self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
            let mut files = self.files.borrow_mut();
            let at = files.iter().position(|&held| held == file.as_raw_fd()).expect("KVM holds it");
            files.swap_remove(at);
            Ok(())
        }
        fn pin(&self) -> Result<(), Refusal> {
            self.pins.set(self.pins.get() + 1);
            Ok(())
        }
        fn unpin(&self) {
            self.pins.set(self.pins.get() - 1);
        }
    }

    fn file() -> Option<OwnedFd> {
        Some(std::fs::File::open("/dev/null").unwrap().into())
    }

    #[track_caller]
    fn expect(vm: &FakeVm, files: usize, pins: u32) {
        assert_eq!((vm.files.borrow().len(), vm.pins.get()), (files, pins), "files with KVM, pins");
    }

    #[test]
    fn coherent_dma_is_pinned_but_not_registered_with_kvm() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        vm.started.set(true);

        let handle = registry.register(ONE, Dma::Coherent, None).unwrap();
        expect(&vm, 0, 1);
        assert_eq!((registry.status().registered, registry.status().non_coherent()), (1, false));

        registry.unregister(ONE, handle).unwrap();
        expect(&vm, 0, 0);
    }

    #[test]
    fn after_the_start_a_registration_that_would_change_the_answer_is_refused_and_pins_nothing() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        vm.started.set(true);
        assert_eq!(registry.register(ONE, Dma::NonCoherent, file()), Err(Reason::Locked.into()));
        expect(&vm, 0, 0);
    }

    #[test]
    fn a_registration_is_refused_if_a_vcpu_enters_while_the_file_is_added() {
        let vm = FakeVm { starts_during_add: Cell::new(true), ..FakeVm::default() };
        let mut registry = Registry::new(&vm, Policy::Lock);
        assert_eq!(registry.register(ONE, Dma::NonCoherent, file()), Err(Reason::Locked.into()));
        expect(&vm, 0, 0);
    }

    #[test]
    fn a_refusal_by_kvm_leaves_nothing_behind() {
        let vm = FakeVm { refuses: Cell::new(true), ..FakeVm::default() };
        let mut registry = Registry::new(&vm, Policy::Lock);
        let refusal = registry.register(ONE, Dma::NonCoherent, file()).unwrap_err();
        assert_eq!(refusal, Refusal { reason: Reason::Kvm, errno: libc::EINVAL });
        expect(&vm, 0, 0);
        assert_eq!(registry.status().told, 0);
    }

    #[test]
    fn under_lock_the_last_file_is_kept_until_the_next_backend_registers() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        registry.register(ONE, Dma::NonCoherent, file()).unwrap();
        vm.started.set(true);

        assert_eq!(registry.remove_peer(ONE), 1);
        expect(&vm, 1, 0);
        assert!(registry.status().kept && registry.status().non_coherent());

        registry.register(TWO, Dma::NonCoherent, file()).unwrap();
        expect(&vm, 1, 1);
        assert_eq!((registry.status().told, registry.status().kept), (1, false));
    }

    #[test]
    fn under_dynamic_files_are_added_and_deleted_with_their_registrations() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Dynamic);
        vm.started.set(true);
        let handle = registry.register(ONE, Dma::NonCoherent, file()).unwrap();
        expect(&vm, 1, 1);
        registry.unregister(ONE, handle).unwrap();
        expect(&vm, 0, 0);
    }

    #[test]
    fn only_the_owner_unregisters_and_only_once() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        let handle = registry.register(ONE, Dma::Coherent, None).unwrap();
        assert_eq!(registry.unregister(TWO, handle), Err(Reason::NoSuchHandle.into()));
        assert_eq!(registry.unregister(ONE, handle), Ok(()));
        assert_eq!(registry.unregister(ONE, handle), Err(Reason::NoSuchHandle.into()));
        expect(&vm, 0, 0);
    }

    #[test]
    fn registrations_are_limited_and_end_with_their_connection() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        for _ in 0..MAX_PER_PEER {
            registry.register(ONE, Dma::Coherent, None).unwrap();
        }
        assert_eq!(registry.register(ONE, Dma::Coherent, None), Err(Reason::LimitReached.into()));
        registry.register(TWO, Dma::Coherent, None).unwrap();
        assert_eq!(registry.remove_peer(ONE), MAX_PER_PEER);
        expect(&vm, 0, 1);
    }

    #[test]
    fn an_unexpected_file_and_a_missing_file_are_malformed() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        assert_eq!(registry.register(ONE, Dma::Coherent, file()), Err(Reason::Malformed.into()));
        assert_eq!(registry.register(ONE, Dma::NonCoherent, None), Err(Reason::Malformed.into()));
        expect(&vm, 0, 0);
    }

    #[test]
    fn a_dropped_registry_removes_its_pins() {
        let vm = FakeVm::default();
        let mut registry = Registry::new(&vm, Policy::Lock);
        registry.register(ONE, Dma::NonCoherent, file()).unwrap();
        registry.register(TWO, Dma::Coherent, None).unwrap();
        drop(registry);
        expect(&vm, 0, 0);
    }
}
