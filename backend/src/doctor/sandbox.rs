//! What `--sandbox` can take away on this kernel. The program serves without any of it; `--sandbox strict` does not.

use landlock::LandlockStatus;

use super::finding::{Finding, Outcome};
use crate::sandbox;
use crate::sys::has_seccomp_trap;

pub(super) fn check() -> Vec<Finding> {
    let layers = [landlock(sandbox::landlock_status()), seccomp(has_seccomp_trap())];
    let strict = strict(layers.iter().all(|layer| layer.outcome == Outcome::Ok));
    layers.into_iter().chain([strict]).collect()
}

/// `None`: the kernel did not say.
pub(super) fn landlock(status: Option<LandlockStatus>) -> Finding {
    const CHECK: &str = "landlock";
    match status {
        Some(LandlockStatus::Available { effective_abi, kernel_abi }) => {
            let version = kernel_abi.map_or_else(|| effective_abi.to_string(), |version| version.to_string());
            Finding::ok(CHECK, format!("ABI {version}"))
        }
        Some(LandlockStatus::NotEnabled) => Finding::note(
            CHECK,
            "built into this kernel, and off",
            "boot with lsm=landlock,… in front of the list in /sys/kernel/security/lsm",
        ),
        Some(LandlockStatus::NotImplemented) => Finding::note(
            CHECK,
            "this kernel lacks it",
            "use Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK=y; until then files can be named while the program serves",
        ),
        None => Finding::note(
            CHECK,
            "a thread could not restrict itself",
            "in a container, let its seccomp profile allow the landlock system calls",
        ),
    }
}

pub(super) fn seccomp(has_trap: bool) -> Finding {
    if has_trap {
        Finding::ok("seccomp", "filters can answer a call with SIGSYS")
    } else {
        let fix = "use a kernel with CONFIG_SECCOMP_FILTER=y; until then each thread can make every system call";
        Finding::note("seccomp", "this kernel lacks filters, or SECCOMP_RET_TRAP", fix)
    }
}

/// Whether `--sandbox strict` starts. `complete`: no layer is missing.
pub(super) fn strict(complete: bool) -> Finding {
    const CHECK: &str = "sandbox";
    if complete {
        Finding::ok(CHECK, "complete, so --sandbox strict can be used; user namespaces are not needed")
    } else {
        let fix =
            "see above; --sandbox auto, the default, serves with what there is, and --sandbox strict does not start";
        Finding::note(CHECK, "incomplete; user namespaces would not help, and are not needed", fix)
    }
}
