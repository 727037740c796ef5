//! The library in stock QEMU, in the sandbox that libvirt uses. The guests do not run; the testbed has the tests with a running
//! guest. Without QEMU or KVM the tests say so and pass.
#![expect(clippy::unwrap_used, reason = "a test may")]

mod library;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use shim::{Client, Status};

const SANDBOX: [&str; 2] = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];

struct Qemu {
    process: Child,
    directory: PathBuf,
}

impl Qemu {
    /// `None` without QEMU, or without KVM if `accelerator` is KVM.
    fn start(name: &str, accelerator: &str, more: &[&str]) -> Option<Self> {
        let missing = |name: &str| println!("no {name} here: not tested");
        if accelerator == "kvm" && !Path::new("/dev/kvm").exists() {
            missing("/dev/kvm");
            return None;
        }
        let directory = std::env::temp_dir().join(format!("shim-qemu-{}-{name}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command.env("LD_PRELOAD", library::path()).env("KVM_VFIO_SHIM_SOCKET", directory.join("shim"));
        command.args(["-S", "-M", "q35,memory-backend=ram", "-m", "64M", "-accel", accelerator]);
        command.args(["-object", "memory-backend-memfd,id=ram,size=64M,share=on"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]).args(more);
        let process = command.current_dir(&directory).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        if process.is_err() {
            missing("qemu-system-x86_64");
            _ = std::fs::remove_dir(&directory);
        }
        process.ok().map(|process| Self { process, directory })
    }

    fn client(&self) -> (Client, Status) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match Client::connect(&self.directory.join("shim"), Client::DEFAULT_TIMEOUT) {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
        _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn under_tcg_there_is_no_vm_and_a_coherent_device_can_be_registered() {
    let Some(qemu) = Qemu::start("tcg", "tcg", &SANDBOX) else { return };
    let (mut client, status) = qemu.client();
    assert_eq!((status.vms, status.vmm_pid), (0, qemu.process.id()));
    let registration = client.register_coherent().unwrap();
    assert_eq!(registration.status.registered, 1);
    client.unregister(registration.handle).unwrap();
}

#[test]
fn with_kvm_there_is_one_vm() {
    let Some(qemu) = Qemu::start("kvm", "kvm", &SANDBOX) else { return };
    let (mut client, _) = qemu.client();
    // The socket may exist before KVM_CREATE_VM returns to QEMU.
    let deadline = Instant::now() + Duration::from_secs(30);
    while client.query().unwrap().vms == 0 {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(60));
    }
    assert_eq!(client.query().unwrap().vms, 1);
}

#[test]
fn with_daemonize_the_remaining_process_serves() {
    let daemon = ["-daemonize", "-pidfile", "pid"];
    // Without the sandbox, whose spawn=deny forbids the fork.
    let Some(mut qemu) = Qemu::start("daemon", "tcg", &daemon) else { return };
    assert!(qemu.process.wait().unwrap().success());
    let pid = std::fs::read_to_string(qemu.directory.join("pid")).unwrap();
    let pid: u32 = pid.trim().parse().unwrap();
    let (_client, status) = qemu.client();
    let ended = Command::new("kill").arg(pid.to_string()).status().unwrap();
    assert!(ended.success());
    assert_eq!(status.vmm_pid, pid);
}
