//! When KVM's answer to "may a device go behind the caches?" may change. Pure: it knows numbers, no files.
//!
//! KVM takes the question anew at each file added or deleted, but it is blind to the past: lines that a vCPU left in another
//! processor's cache before a file was added are missed by the guest's first WBINVD (`kvm_arch_vcpu_load` notes the
//! processors only while there is such a file). So, as KVM's developers once wanted KVM itself to do, the answer is locked
//! once it has been used: a registration that would change it is refused, a removal leaves it as it is.
//!
//! ```text
//!   KVM's answer:  coherent            :              non-coherent
//!                                      :
//!                      ┌── admit ──────:───────►┐  admit: told + 1
//!                      │ (not locked)  :        ▼    ┌──────┐
//!                  ┌───┴───┐           :   ┌─────────┴┐     │
//!     locked: ─────│ Empty │◄──────────:───┤ Told (n) │◄────┘
//!     refused      └───────┘ remove    :   └┬────────┬┘  remove, n > 1: its file is deleted
//!                            the last, :    │        ▲
//!                            not locked:    │        │ admit: the kept file is deleted
//!                                      :    ▼        │ after the new one was added
//!                       remove the last,:  ┌─────────┴┐
//!                       locked: its file:  │   Kept   │
//!                       stays with KVM  :  └──────────┘
//!
//!   locked = the policy is `lock` and a vCPU has run; never undone while the VM lives
//! ```
//!
//! At most one file is kept. It pins nothing, as it was never bound, and it lets a backend that has died register again. But
//! the kernel waits for it when the device is to be unbound from its driver: to give the device back to the host
//! while the VM runs, the policy must be `dynamic`.

use crate::wire::Policy;

/// How KVM's answer came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No file: coherent.
    Empty,
    /// The files of this many registrations, at least one: non-coherent.
    Told(u16),
    /// Only the file of a registration that has gone: non-coherent.
    Kept,
}

/// What is to be done with the file of a registration that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// KVM must let go of it.
    Delete,
    /// KVM's answer rests on it: it stays.
    Keep,
}

/// The state machine drawn above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    policy: Policy,
    state: State,
}

/// The registration would change KVM's answer, and a vCPU has already run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locked;

impl Lock {
    /// No file yet.
    #[must_use]
    pub const fn new(policy: Policy) -> Self {
        Self { policy, state: State::Empty }
    }

    /// What was configured.
    #[must_use]
    pub const fn policy(&self) -> Policy {
        self.policy
    }

    fn locked(&self, started: bool) -> bool {
        started && self.policy == Policy::Lock
    }

    /// May a file be added? Changes nothing: adding can still fail, and a vCPU can run meanwhile.
    ///
    /// # Errors
    /// [`Locked`].
    pub fn admit(&self, started: bool) -> Result<(), Locked> {
        if self.state == State::Empty && self.locked(started) { Err(Locked) } else { Ok(()) }
    }

    /// A file has been added. True if the kept file, if there is one, is to be deleted now.
    #[must_use]
    pub fn added(&mut self) -> bool {
        let kept = self.state == State::Kept;
        self.state = State::Told(self.told().saturating_add(1));
        kept
    }

    /// The registration of a file goes.
    #[must_use]
    pub fn remove(&mut self, started: bool) -> Removal {
        debug_assert!(self.told() > 0, "only what was added is removed");
        let (state, removal) = match self.state {
            State::Told(n @ 2..) => (State::Told(n - 1), Removal::Delete),
            _ if self.locked(started) => (State::Kept, Removal::Keep),
            _ => (State::Empty, Removal::Delete),
        };
        self.state = state;
        removal
    }

    /// Living registrations whose file KVM holds.
    #[must_use]
    pub const fn told(&self) -> u16 {
        match self.state {
            State::Told(n) => n,
            State::Empty | State::Kept => 0,
        }
    }

    /// True if KVM holds only the file of a registration that has gone.
    #[must_use]
    pub fn kept(&self) -> bool {
        self.state == State::Kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KVM as it is: a set of files, and an answer that follows from it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct World {
        lock: Lock,
        started: bool,
        files: u16,
        answers_since_start: Vec<bool>,
    }

    impl World {
        fn new(policy: Policy) -> Self {
            Self { lock: Lock::new(policy), started: false, files: 0, answers_since_start: vec![] }
        }
        fn note(&mut self) {
            let answer = self.files > 0;
            if self.started && self.answers_since_start.last() != Some(&answer) {
                self.answers_since_start.push(answer);
            }
        }
        fn start(mut self) -> Self {
            self.started = true;
            self.note();
            self
        }
        fn register(mut self) -> Self {
            if self.lock.admit(self.started).is_ok() {
                self.files += 1;
                self.note();
                if self.lock.added() {
                    self.files -= 1;
                    self.note();
                }
            }
            self
        }
        fn unregister(mut self) -> Self {
            if self.lock.remove(self.started) == Removal::Delete {
                self.files -= 1;
                self.note();
            }
            self
        }
    }

    /// Every world within `steps` steps.
    fn worlds(policy: Policy, steps: usize) -> Vec<World> {
        let mut all = vec![World::new(policy)];
        let mut last = all.clone();
        for _ in 0..steps {
            let mut next = Vec::new();
            for world in last {
                next.push(world.clone().register());
                if !world.started {
                    next.push(world.clone().start());
                }
                if world.lock.told() > 0 {
                    next.push(world.unregister());
                }
            }
            all.extend(next.iter().cloned());
            last = next;
        }
        all
    }

    #[test]
    fn under_lock_the_answer_never_changes_once_a_vcpu_has_run() {
        for world in worlds(Policy::Lock, 9) {
            assert!(world.answers_since_start.len() <= 1, "{world:?}");
        }
    }

    #[test]
    fn dynamic_admits_always_and_keeps_nothing() {
        for world in worlds(Policy::Dynamic, 9) {
            assert_eq!(world.lock.admit(world.started), Ok(()));
            assert_eq!(world.files, world.lock.told(), "{world:?}");
            assert!(!world.lock.kept());
        }
    }

    #[test]
    fn kvm_holds_a_file_per_registration_and_at_most_one_more() {
        for world in worlds(Policy::Lock, 9) {
            assert_eq!(world.files, world.lock.told() + u16::from(world.lock.kept()), "{world:?}");
        }
    }

    #[test]
    fn a_vm_that_started_non_coherent_always_takes_the_next_backend() {
        for world in worlds(Policy::Lock, 9) {
            let fixed_coherent = world.answers_since_start == [false];
            assert_eq!(world.lock.admit(world.started).is_err(), fixed_coherent, "{world:?}");
        }
    }

    #[test]
    fn before_the_first_vcpu_runs_the_last_file_goes() {
        let world = World::new(Policy::Lock).register().unregister().start();
        assert_eq!((world.files, world.lock.kept()), (0, false));
    }
}
