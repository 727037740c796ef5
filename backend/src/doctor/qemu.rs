//! What QEMU must be, and how a running one must share its memory.

use std::process::{Command, Stdio};

use super::finding::{Finding, Host};

/// The first QEMU with vhost-user-blk that connects again (`reconnect`).
const DISK_SINCE: (u32, u32) = (4, 2);
/// The first QEMU with `vfio-user-pci`.
const WHOLE_SINCE: (u32, u32) = (10, 1);

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let mut findings = vec![installed()];
    findings.extend(running(host));
    findings
}

fn installed() -> Finding {
    let architecture = std::env::consts::ARCH;
    let program = format!("qemu-system-{architecture}");
    let output = Command::new(&program).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    match output {
        Ok(output) => version(&String::from_utf8_lossy(&output.stdout)),
        Err(error) => {
            let fix = "install it, unless another machine or container has it";
            Finding::note("qemu", format!("{program}: {error}"), fix)
        }
    }
}

/// Of the first line of `--version`.
pub(super) fn version(text: &str) -> Finding {
    let line = text.lines().next().unwrap_or_default();
    let number = line.split_whitespace().skip_while(|word| *word != "version").nth(1).unwrap_or_default();
    let mut parts = number.split('.').map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (parts.next(), parts.next()) else {
        return Finding::note("qemu", format!("{line:?} has no version"), "QEMU 4.2 or newer is needed");
    };
    match (major, minor) {
        version if version >= WHOLE_SINCE => Finding::ok("qemu", line),
        version if version >= DISK_SINCE => {
            Finding::note("qemu", line, "it has no vfio-user-pci; a whole function (--vfio-user) needs 10.1 or newer")
        }
        _ => Finding::problem("qemu", line, "install QEMU 4.2 or newer"),
    }
}

/// The running QEMUs that use this program or one like it.
fn running(host: &Host) -> Vec<Finding> {
    let processes = host.list("proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    processes.filter_map(|pid| shared(&pid, &host.read(&format!("proc/{pid}/cmdline"))?)).collect()
}

/// Whether a QEMU shares its memory; `None` for a process that has no need to. `command` has NUL after each argument.
pub(super) fn shared(pid: &str, command: &str) -> Option<Finding> {
    let arguments: Vec<_> = command.split('\0').collect();
    let program = arguments.first()?.rsplit('/').next()?;
    let peer = arguments.iter().any(|argument| argument.contains("vhost-user") || argument.contains("vfio-user"));
    if !program.starts_with("qemu") || !peer {
        return None;
    }
    let backends = arguments.iter().filter(|argument| argument.contains("memory-backend-"));
    let backends: Vec<_> = backends.map(|argument| argument.replace([' ', '"'], "").replace(':', "=")).collect();
    let is_shared = |backend: &String| {
        let on = backend.contains("share=on") || backend.contains("share=true");
        let off = backend.contains("share=off") || backend.contains("share=false");
        on || backend.contains("memory-backend-memfd") && !off
    };
    let fix = "give it -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem";
    let name = format!("QEMU (pid {pid})");
    Some(if backends.is_empty() {
        Finding::problem("shared-memory", format!("{name} shares no memory"), fix)
    } else if backends.iter().all(is_shared) {
        Finding::ok("shared-memory", format!("{name} shares its memory"))
    } else {
        Finding::problem("shared-memory", format!("{name} has memory that it does not share"), fix)
    })
}
