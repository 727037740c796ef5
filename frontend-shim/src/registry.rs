//! Who has registered what. Each registration pins guest memory down against discards; one for non-coherent DMA also has a
//! file that KVM is given, if the lock lets it. A connection that ends takes its registrations with it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::lock::{Lock, Removal};
use crate::wire::{Dma, Policy, Reason, Refusal, Status};

/// Registrations of one connection.
const PER_PEER: usize = 8;
/// Registrations of all connections.
const IN_ALL: usize = 64;

/// What a registration needs of the VMM's process: [`crate::Vm`], and in tests a machine without KVM.
pub(crate) trait Machine {
    /// Living VMs.
    fn vms(&self) -> u16;
    /// When the first vCPU entered the guest, milliseconds since 1970; 0: none has.
    fn started_ms(&self) -> u64;
    /// Gives KVM a file that is a VFIO device's or group's, and not bound.
    fn add(&self, file: BorrowedFd<'_>) -> Result<(), Refusal>;
    /// Takes it back.
    fn delete(&self, file: BorrowedFd<'_>) -> Result<(), Refusal>;
    /// From its return to [`Self::unpin`], discards of guest memory have no effect.
    fn pin(&self) -> Result<(), Refusal>;
    /// Takes one [`Self::pin`] back.
    fn unpin(&self);
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerId(pub(crate) u64);

struct Registration {
    handle: u64,
    owner: PeerId,
    /// The file KVM was given, for non-coherent DMA.
    file: Option<OwnedFd>,
}

/// All registrations, and the kept file if there is one.
pub(crate) struct Registry<'a, M: Machine> {
    machine: &'a M,
    lock: Lock,
    live: Vec<Registration>,
    kept: Option<OwnedFd>,
    handles: u64,
}

impl<'a, M: Machine> Registry<'a, M> {
    pub(crate) fn new(machine: &'a M, policy: Policy) -> Self {
        Self { machine, lock: Lock::new(policy), live: Vec::new(), kept: None, handles: 0 }
    }

    fn started(&self) -> bool {
        self.machine.started_ms() != 0
    }

    /// A device is about to reach guest memory.
    pub(crate) fn register(&mut self, owner: PeerId, dma: Dma, file: Option<OwnedFd>) -> Result<u64, Refusal> {
        let own = self.live.iter().filter(|registration| registration.owner == owner).count();
        if own >= PER_PEER || self.live.len() >= IN_ALL {
            return Err(Reason::TooMany.into());
        }
        match (dma, &file) {
            (Dma::Coherent, None) => self.machine.pin()?,
            (Dma::NonCoherent, Some(file)) => {
                self.machine.pin()?;
                self.tell(file.as_fd()).inspect_err(|_| self.machine.unpin())?;
            }
            _ => return Err(Reason::Malformed.into()),
        }
        self.handles += 1;
        self.live.push(Registration { handle: self.handles, owner, file });
        Ok(self.handles)
    }

    /// Gives KVM the file, unless that would change a locked answer.
    fn tell(&mut self, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.lock.admit(self.started()).map_err(|_| Reason::Locked)?;
        self.machine.add(file)?;
        // A vCPU may have entered the guest since the question above.
        if self.lock.admit(self.started()).is_err() {
            self.machine.delete(file)?;
            return Err(Reason::Locked.into());
        }
        if self.lock.added()
            && let Some(kept) = self.kept.take()
        {
            // Nothing worse than one file too many with KVM, and the new one is there.
            _ = self.machine.delete(kept.as_fd());
        }
        Ok(())
    }

    /// It does no longer. `owner` must be who registered it.
    pub(crate) fn unregister(&mut self, owner: PeerId, handle: u64) -> Result<(), Refusal> {
        let is_it = |registration: &Registration| registration.owner == owner && registration.handle == handle;
        let index = self.live.iter().position(is_it).ok_or(Reason::NoSuchHandle)?;
        let registration = self.live.swap_remove(index);
        self.forget(registration)
    }

    /// The connection has ended. Returns how many registrations went with it.
    pub(crate) fn leave(&mut self, owner: PeerId) -> usize {
        let gone: Vec<_> = self.live.extract_if(.., |registration| registration.owner == owner).collect();
        let count = gone.len();
        for registration in gone {
            // KVM can refuse only when the VM has gone, and then its files have, too.
            _ = self.forget(registration);
        }
        count
    }

    fn forget(&mut self, registration: Registration) -> Result<(), Refusal> {
        self.machine.unpin();
        let Some(file) = registration.file else { return Ok(()) };
        match self.lock.remove(self.started()) {
            Removal::Delete => self.machine.delete(file.as_fd()),
            Removal::Keep => {
                self.kept = Some(file);
                Ok(())
            }
        }
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            vmm_pid: std::process::id(),
            vms: self.machine.vms(),
            policy: self.lock.policy(),
            started_ms: self.machine.started_ms(),
            registered: u16::try_from(self.live.len()).unwrap_or(u16::MAX),
            told: self.lock.told(),
            kept: self.lock.kept(),
        }
    }
}

impl<M: Machine> Drop for Registry<'_, M> {
    /// The shim ends before the VM: no one would take these back.
    fn drop(&mut self) {
        while let Some(owner) = self.live.first().map(|registration| registration.owner) {
            self.leave(owner);
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

    /// A machine with a VM that takes every file.
    #[derive(Default)]
    pub(crate) struct Fake {
        pub(crate) started: Cell<bool>,
        starts_during_add: Cell<bool>,
        refuses: Cell<bool>,
        files: RefCell<Vec<i32>>,
        pub(crate) pins: Cell<u32>,
    }

    impl Machine for Fake {
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
    fn expect(machine: &Fake, files: usize, pins: u32) {
        assert_eq!((machine.files.borrow().len(), machine.pins.get()), (files, pins), "files with KVM, pins");
    }

    #[test]
    fn coherent_dma_pins_and_tells_kvm_nothing() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        machine.started.set(true);

        let handle = registry.register(ONE, Dma::Coherent, None).unwrap();
        expect(&machine, 0, 1);
        assert_eq!((registry.status().registered, registry.status().non_coherent()), (1, false));

        registry.unregister(ONE, handle).unwrap();
        expect(&machine, 0, 0);
    }

    #[test]
    fn after_the_start_a_registration_that_changes_the_answer_is_refused_and_pins_nothing() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        machine.started.set(true);
        assert_eq!(registry.register(ONE, Dma::NonCoherent, file()), Err(Reason::Locked.into()));
        expect(&machine, 0, 0);
    }

    #[test]
    fn a_vcpu_that_enters_while_the_file_is_added_wins() {
        let machine = Fake { starts_during_add: Cell::new(true), ..Fake::default() };
        let mut registry = Registry::new(&machine, Policy::Lock);
        assert_eq!(registry.register(ONE, Dma::NonCoherent, file()), Err(Reason::Locked.into()));
        expect(&machine, 0, 0);
    }

    #[test]
    fn a_refusal_by_kvm_leaves_nothing_behind() {
        let machine = Fake { refuses: Cell::new(true), ..Fake::default() };
        let mut registry = Registry::new(&machine, Policy::Lock);
        let refusal = registry.register(ONE, Dma::NonCoherent, file()).unwrap_err();
        assert_eq!(refusal, Refusal { reason: Reason::Kvm, errno: libc::EINVAL });
        expect(&machine, 0, 0);
        assert_eq!(registry.status().told, 0);
    }

    #[test]
    fn under_lock_the_last_file_is_kept_and_replaced_by_the_next_backends() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        registry.register(ONE, Dma::NonCoherent, file()).unwrap();
        machine.started.set(true);

        assert_eq!(registry.leave(ONE), 1);
        expect(&machine, 1, 0);
        assert!(registry.status().kept && registry.status().non_coherent());

        registry.register(TWO, Dma::NonCoherent, file()).unwrap();
        expect(&machine, 1, 1);
        assert_eq!((registry.status().told, registry.status().kept), (1, false));
    }

    #[test]
    fn under_dynamic_files_come_and_go_with_their_registrations() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Dynamic);
        machine.started.set(true);
        let handle = registry.register(ONE, Dma::NonCoherent, file()).unwrap();
        expect(&machine, 1, 1);
        registry.unregister(ONE, handle).unwrap();
        expect(&machine, 0, 0);
    }

    #[test]
    fn only_the_owner_unregisters_and_only_once() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        let handle = registry.register(ONE, Dma::Coherent, None).unwrap();
        assert_eq!(registry.unregister(TWO, handle), Err(Reason::NoSuchHandle.into()));
        assert_eq!(registry.unregister(ONE, handle), Ok(()));
        assert_eq!(registry.unregister(ONE, handle), Err(Reason::NoSuchHandle.into()));
        expect(&machine, 0, 0);
    }

    #[test]
    fn registrations_are_bounded_and_go_with_their_connection() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        for _ in 0..PER_PEER {
            registry.register(ONE, Dma::Coherent, None).unwrap();
        }
        assert_eq!(registry.register(ONE, Dma::Coherent, None), Err(Reason::TooMany.into()));
        registry.register(TWO, Dma::Coherent, None).unwrap();
        assert_eq!(registry.leave(ONE), PER_PEER);
        expect(&machine, 0, 1);
    }

    #[test]
    fn a_file_where_none_belongs_and_none_where_one_does_are_malformed() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        assert_eq!(registry.register(ONE, Dma::Coherent, file()), Err(Reason::Malformed.into()));
        assert_eq!(registry.register(ONE, Dma::NonCoherent, None), Err(Reason::Malformed.into()));
        expect(&machine, 0, 0);
    }

    #[test]
    fn a_registry_that_ends_takes_its_pins_back() {
        let machine = Fake::default();
        let mut registry = Registry::new(&machine, Policy::Lock);
        registry.register(ONE, Dma::NonCoherent, file()).unwrap();
        registry.register(TWO, Dma::Coherent, None).unwrap();
        drop(registry);
        expect(&machine, 0, 0);
    }
}
