//! Capabilities (capabilities(7)). None is needed to serve. The right to lock memory without a limit is replaced by a limit that is
//! high enough, as long as this process may set one.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What this thread keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// Nothing.
    Nothing,
    /// `CAP_IPC_LOCK`: without it the limit on locked memory would apply, and this process may not raise that.
    IpcLock,
}

/// Decides what is kept, and raises the limit on locked memory if that is what makes a capability superfluous. To be called before
/// any memory is locked: the kernel counts it then in the same way from first to last.
///
/// # Errors
/// The errno of the calls.
pub(super) fn prepare() -> Result<Kept, CapsError> {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_IPC_LOCK)? {
        return Ok(Kept::Nothing);
    }
    let unlimited = Rlimit { current: None, maximum: None };
    if getrlimit(Resource::Memlock).current.is_some() && setrlimit(Resource::Memlock, unlimited).is_err() {
        return Ok(Kept::IpcLock);
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::drop(None, set, Capability::CAP_IPC_LOCK)?;
    }
    Ok(Kept::Nothing)
}

/// Drops all capabilities of this thread but what is `kept`.
///
/// # Errors
/// The errno of the calls.
pub(super) fn drop_all(kept: Kept) -> Result<(), CapsError> {
    let held: CapsHashSet = match kept {
        Kept::Nothing => CapsHashSet::new(),
        Kept::IpcLock => CapsHashSet::from([Capability::CAP_IPC_LOCK]),
    };
    // Kernels without ambient capabilities have none to drop.
    let _ = caps::clear(None, CapSet::Ambient);
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &held)?;
    }
    caps::clear(None, CapSet::Inheritable)
}
