//! What this process gives up once it serves: a guest that gets hold of one of its threads finds little that it can do with it.
//!
//! ```text
//! start ─ prepare: limits, the rules of landlock, the filters of all roles        the helper (helper/) is forked before
//!       ─ threads start: each enters its role with its first statement
//!       ─ all is open ─ the control thread enters its role ─ READY ─ front-ends
//! ```
//!
//! | role | threads | may | may not |
//! |---|---|---|---|
//! | worker | one for each NVMe queue pair | use open descriptors; unmask INTx | open, connect, name a file, start a thread, any other ioctl |
//! | emulation | the emulated controller | use open descriptors | the same, and any ioctl |
//! | guard | the watchdog, the control socket, the metrics | acquire and reset the device, speak over sockets, read what landlock allows | bind, listen, rename |
//! | control | the one that serves a front-end, and those that it starts | the same, and put sockets in place of a predecessor's | start a process, make memory executable |
//!
//! All have no capability, no new privileges, and none may execute a program or map executable memory. The rules of landlock of a
//! worker and of the emulation name no file at all.
//!
//! A filter applies to a thread and to those that it starts. So a thread that was started by the control thread after this has
//! entered its role has that role.

mod calls;
mod capabilities;
mod filter;
mod paths;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;

use landlock::{LandlockStatus, RulesetCreated};
use seccompiler::BpfProgram;

use crate::sys::{has_seccomp_trap, report_violations, settle_allocator};
use capabilities::Kept;
pub use paths::Paths;

/// What a thread is for. See the table at the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes requests from rings.
    Worker,
    /// Is the emulated controller.
    Emulation,
    /// Watches the device, or answers an operator.
    Guard,
    /// Serves a front-end.
    Control,
}

const ROLES: [Role; 4] = [Role::Worker, Role::Emulation, Role::Guard, Role::Control];

/// `--sandbox`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As much as the kernel has.
    Auto,
    /// Everything, or this process does not start.
    Strict,
}

/// Why the sandbox cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel lacks a part of it.
    #[error("this kernel lacks {0}; --sandbox auto serves without that")]
    Missing(&'static str),
    /// The limit on locked memory cannot be raised.
    #[error(
        "CAP_IPC_LOCK would have to be kept, because RLIMIT_MEMLOCK is finite and cannot be raised; set it (ulimit -l unlimited; \
         LimitMEMLOCK=infinity), or give --sandbox auto"
    )]
    Memlock,
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// The step.
        step: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// What the threads of this process enter.
struct Plan {
    mode: Mode,
    kept: Kept,
    /// `None` without landlock.
    named: Option<RulesetCreated>,
    nothing: Option<RulesetCreated>,
    /// The filters in the order of [`ROLES`]; `None` without seccomp.
    filters: Option<Filters>,
}

struct Filters {
    without_clone3: BpfProgram,
    roles: Vec<BpfProgram>,
}

static PLAN: OnceLock<Plan> = OnceLock::new();

thread_local! {
    /// This thread has entered a role, and those that it starts from now on have that role.
    static ENTERED: Cell<bool> = const { Cell::new(false) };
}

/// The role of a thread that is about to be started.
#[derive(Clone, Copy, Debug)]
#[must_use = "the new thread must enter it"]
pub struct Entry {
    role: Role,
    /// It has the role of the thread that starts it.
    inherited: bool,
}

/// Prepares the roles, with `paths` as the files that can be named. `locks`: memory will be locked for a device. To be called before any thread is started and before any memory
/// is locked. Only the first call has an effect.
///
/// # Errors
/// See [`SandboxError`]. With [`Mode::Auto`], only a step that fails on a kernel which has what it needs.
pub fn prepare(mode: Mode, paths: &Paths, locks: bool) -> Result<(), SandboxError> {
    let step = |step| {
        move |error: &dyn std::error::Error| SandboxError::Step { step, source: io::Error::other(error.to_string()) }
    };
    let strict = mode == Mode::Strict;
    let kept = if locks { capabilities::prepare() } else { Ok(Kept::Nothing) };
    let kept = kept.map_err(|error| step("read the capabilities")(&error))?;
    if strict && kept != Kept::Nothing {
        return Err(SandboxError::Memlock);
    }
    let has_landlock = paths::available();
    if strict && !has_landlock {
        return Err(SandboxError::Missing("landlock"));
    }
    let rules = |rules: Result<RulesetCreated, _>| rules.map_err(|error| step("landlock")(&error));
    let (named, nothing) = if has_landlock {
        (Some(rules(paths.ruleset(strict))?), Some(rules(paths::empty(strict))?))
    } else {
        (None, None)
    };
    let filters = match filters() {
        _ if !has_seccomp_trap() => None,
        Ok(filters) => Some(filters),
        Err(error) => return Err(step("seccomp")(&error)),
    };
    if strict && filters.is_none() {
        return Err(SandboxError::Missing("seccomp with SECCOMP_RET_TRAP"));
    }
    settle_allocator();
    report_violations().map_err(|source| SandboxError::Step { step: "handle SIGSYS", source })?;
    // A second call would be one of a test.
    let _ = PLAN.set(Plan { mode, kept, named, nothing, filters });
    Ok(())
}

/// What the kernel has of landlock, as a thread finds it that restricts itself and then ends. `None` if it cannot.
pub fn landlock_status() -> Option<LandlockStatus> {
    paths::status()
}

fn filters() -> Result<Filters, seccompiler::BackendError> {
    let process = std::process::id();
    let roles = ROLES.into_iter().map(|role| filter::of(role, process)).collect::<Result<_, _>>()?;
    Ok(Filters { without_clone3: filter::without_clone3()?, roles })
}

impl Entry {
    /// Of a thread that this thread is about to start: `role`, unless this thread has entered one itself. Whether it has must be
    /// known before the new thread runs.
    pub fn new(role: Role) -> Self {
        Self { role, inherited: ENTERED.get() }
    }

    /// In the new thread, its first statement.
    pub fn enter(self) {
        ENTERED.set(true);
        if !self.inherited {
            enter(self.role);
        }
    }
}

/// Gives up what the role of this thread does not need. Without [`prepare`] nothing changes.
pub fn enter(role: Role) {
    let Some(plan) = PLAN.get() else { return };
    let entered = plan.enter(role);
    ENTERED.set(true);
    match entered {
        Ok(line) if role == Role::Control => log::info!("sandbox: {line}"),
        Ok(_) => {}
        Err(error) if plan.mode == Mode::Auto => log::warn!("sandbox: {role:?}: {error}"),
        Err(error) => {
            log::error!("sandbox: {role:?}: {error}");
            std::process::exit(1);
        }
    }
}

impl Plan {
    /// Returns what is enforced from now on.
    fn enter(&self, role: Role) -> Result<String, SandboxError> {
        let step = |step| {
            move |error: &dyn std::error::Error| SandboxError::Step {
                step,
                source: io::Error::other(error.to_string()),
            }
        };
        capabilities::drop_all(self.kept).map_err(|error| step("drop capabilities")(&error))?;
        rustix::thread::set_no_new_privs(true).map_err(|error| step("PR_SET_NO_NEW_PRIVS")(&error))?;
        let rules = match role {
            Role::Worker | Role::Emulation => &self.nothing,
            Role::Guard | Role::Control => &self.named,
        };
        let landlock = match rules {
            Some(rules) => {
                let rules = rules.try_clone().map_err(|error| step("landlock")(&error))?;
                paths::describe(&rules.restrict_self().map_err(|error| step("landlock")(&error))?)
            }
            None => "no landlock, which this kernel lacks",
        };
        let seccomp = match &self.filters {
            Some(filters) => {
                let index = ROLES.iter().position(|known| *known == role).unwrap_or_default();
                for filter in [&filters.without_clone3, &filters.roles[index]] {
                    seccompiler::apply_filter(filter).map_err(|error| step("seccomp")(&error))?;
                }
                "seccomp"
            }
            None => "no seccomp, which this kernel lacks",
        };
        let capabilities = match self.kept {
            Kept::Nothing => "no capability",
            Kept::IpcLock => "no capability but CAP_IPC_LOCK, because RLIMIT_MEMLOCK is finite",
        };
        Ok(format!("{capabilities}, no new privileges, {landlock}, {seccomp}"))
    }
}
