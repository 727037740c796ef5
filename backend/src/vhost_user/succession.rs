//! Who may wait while another front-end is served, to take its place: nobody, unless an operator says so.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The permission. Clones are the same one.
#[derive(Clone, Default)]
pub struct Succession(Arc<Mutex<Permission>>);

#[derive(Default)]
enum Permission {
    #[default]
    Nobody,
    /// The next one that connects.
    Once(Option<PathBuf>),
    /// Any, one after the other.
    Always,
}

impl Succession {
    /// Permits any front-end of the same user, one at a time.
    pub fn allow_always(&self) {
        *self.permission() = Permission::Always;
    }

    /// Permits one front-end. The shim of its VM listens at `kvm_socket`, if the device is registered with one.
    pub fn allow_once(&self, kvm_socket: Option<PathBuf>) {
        *self.permission() = Permission::Once(kvm_socket);
    }

    /// Permits no more. One that waits already goes on to wait.
    pub fn withdraw(&self) {
        *self.permission() = Permission::Nobody;
    }

    pub(super) fn is_allowed(&self) -> bool {
        !matches!(*self.permission(), Permission::Nobody)
    }

    /// Where the shim of the next VM listens, if that was said.
    pub(super) fn kvm_socket(&self) -> Option<PathBuf> {
        match &*self.permission() {
            Permission::Once(socket) => socket.clone(),
            _ => None,
        }
    }

    /// A front-end waits now.
    pub(super) fn was_used(&self) {
        let mut permission = self.permission();
        if let Permission::Once(_) = *permission {
            *permission = Permission::Nobody;
        }
    }

    fn permission(&self) -> MutexGuard<'_, Permission> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_may_wait_unless_it_is_said_and_one_who_may_wait_once_is_the_last() {
        let succession = Succession::default();
        assert!(!succession.is_allowed());

        succession.allow_once(Some("/run/next".into()));
        assert_eq!((succession.is_allowed(), succession.kvm_socket()), (true, Some("/run/next".into())));
        succession.was_used();
        assert!(!succession.is_allowed());

        succession.allow_always();
        succession.was_used();
        assert!(succession.is_allowed());
        succession.withdraw();
        assert!(!succession.is_allowed());
    }
}
