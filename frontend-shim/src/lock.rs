//! When KVM's answer to "is there non-coherent DMA?" may change. This module only counts; it holds no files.
//!
//! KVM decides again each time a file is added or deleted, but it does not know what happened before. Cache lines that a vCPU
//! left in another processor's cache before a file was added are missed by the guest's first WBINVD, because
//! `kvm_arch_vcpu_load` records the processors only while there is such a file. So the answer is locked once a vCPU has run, as
//! KVM's developers once planned for KVM itself: a registration that would change it is refused, and a removal leaves it as
//! it is.
//!
//! ```text
//!   KVM's answer:  coherent            :              non-coherent
//!                                      :
//!                      ┌── admit ──────:───────►┐  admit: n + 1
//!                      │ (not locked)  :        ▼    ┌──────┐
//!                  ┌───┴───┐           :   ┌─────────┴┐     │
//!     locked: ─────│ Empty │◄──────────:───┤ Live (n) │◄────┘
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
//! At most one file is kept. It was never bound, so it pins nothing, and it lets a backend that has died register again. But
//! an unbind of the device from its driver waits until the file is closed. To return the device to the host while the VM
//! runs, the policy must be `dynamic`.

use crate::wire::Policy;

/// Which files KVM holds, and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No file: coherent.
    Empty,
    /// The files of this many registrations, at least one: non-coherent.
    Live(u16),
    /// Only the file of a registration that has ended: non-coherent.
    Kept,
}

/// What to do with the file of a registration that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Delete it from the kvm-vfio device.
    Delete,
    /// Leave it there, because KVM's answer depends on it.
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
    /// Starts without files.
    #[must_use]
    pub const fn new(policy: Policy) -> Self {
        Self { policy, state: State::Empty }
    }

    /// The configured policy.
    #[must_use]
    pub const fn policy(&self) -> Policy {
        self.policy
    }

    fn locked(&self, started: bool) -> bool {
        started && self.policy == Policy::Lock
    }

    /// Checks whether a file may be added. Changes nothing: the add can still fail, and a vCPU can start meanwhile.
    ///
    /// # Errors
    /// [`Locked`].
    pub fn admit(&self, started: bool) -> Result<(), Locked> {
        if self.state == State::Empty && self.locked(started) { Err(Locked) } else { Ok(()) }
    }

    /// Records that a file has been added. True if the kept file must be deleted now.
    #[must_use]
    pub fn added(&mut self) -> bool {
        let kept = self.state == State::Kept;
        self.state = State::Live(self.live().saturating_add(1));
        kept
    }

    /// Records that the registration of a file ends.
    #[must_use]
    pub fn remove(&mut self, started: bool) -> Removal {
        debug_assert!(self.live() > 0, "only an added file can be removed");
        let (state, removal) = match self.state {
            State::Live(n @ 2..) => (State::Live(n - 1), Removal::Delete),
            _ if self.locked(started) => (State::Kept, Removal::Keep),
            _ => (State::Empty, Removal::Delete),
        };
        self.state = state;
        removal
    }

    /// Current registrations whose file KVM holds.
    #[must_use]
    pub const fn live(&self) -> u16 {
        match self.state {
            State::Live(n) => n,
            State::Empty | State::Kept => 0,
        }
    }

    /// True if KVM holds only the file of a registration that has ended.
    #[must_use]
    pub fn kept(&self) -> bool {
        self.state == State::Kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lock, and KVM as it behaves: it has a number of files, and its answer follows from that number.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Model {
        lock: Lock,
        started: bool,
        files: u16,
        answers_since_start: Vec<bool>,
    }

    impl Model {
        fn new(policy: Policy) -> Self {
            Self { lock: Lock::new(policy), started: false, files: 0, answers_since_start: vec![] }
        }
        fn record_answer(&mut self) {
            let answer = self.files > 0;
            if self.started && self.answers_since_start.last() != Some(&answer) {
                self.answers_since_start.push(answer);
            }
        }
        fn start(mut self) -> Self {
            self.started = true;
            self.record_answer();
            self
        }
        fn register(mut self) -> Self {
            if self.lock.admit(self.started).is_ok() {
                self.files += 1;
                self.record_answer();
                if self.lock.added() {
                    self.files -= 1;
                    self.record_answer();
                }
            }
            self
        }
        fn unregister(mut self) -> Self {
            if self.lock.remove(self.started) == Removal::Delete {
                self.files -= 1;
                self.record_answer();
            }
            self
        }
    }

    /// Every state that can be reached within `steps` steps.
    fn models(policy: Policy, steps: usize) -> Vec<Model> {
        let mut all = vec![Model::new(policy)];
        let mut last = all.clone();
        for _ in 0..steps {
            let mut next = Vec::new();
            for model in last {
                next.push(model.clone().register());
                if !model.started {
                    next.push(model.clone().start());
                }
                if model.lock.live() > 0 {
                    next.push(model.unregister());
                }
            }
            all.extend(next.iter().cloned());
            last = next;
        }
        all
    }

    #[test]
    fn under_lock_the_answer_never_changes_once_a_vcpu_has_run() {
        for model in models(Policy::Lock, 9) {
            assert!(model.answers_since_start.len() <= 1, "{model:?}");
        }
    }

    #[test]
    fn dynamic_always_admits_and_keeps_nothing() {
        for model in models(Policy::Dynamic, 9) {
            assert_eq!(model.lock.admit(model.started), Ok(()));
            assert_eq!(model.files, model.lock.live(), "{model:?}");
            assert!(!model.lock.kept());
        }
    }

    #[test]
    fn kvm_holds_one_file_per_registration_and_at_most_one_more() {
        for model in models(Policy::Lock, 9) {
            assert_eq!(model.files, model.lock.live() + u16::from(model.lock.kept()), "{model:?}");
        }
    }

    #[test]
    fn a_vm_that_started_non_coherent_always_admits_the_next_backend() {
        for model in models(Policy::Lock, 9) {
            let fixed_coherent = model.answers_since_start == [false];
            assert_eq!(model.lock.admit(model.started).is_err(), fixed_coherent, "{model:?}");
        }
    }

    #[test]
    fn before_the_first_vcpu_runs_the_last_file_is_deleted() {
        let model = Model::new(Policy::Lock).register().unregister().start();
        assert_eq!((model.files, model.lock.kept()), (0, false));
    }
}
