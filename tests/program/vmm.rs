//! Two backends and one VM, as processes: registration with the VM's shim, blocked discards, and the log.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use kvm_vfio_shim::{Client, Status};
use rustix::process::Signal;
use vmm_sys_util::tempdir::TempDir;

use crate::process::Process;

/// The example VMM of the shim (frontend-shim/preload/examples/toy_vmm.rs) with the shim library preloaded.
struct TestVmm {
    process: Child,
    output: BufReader<ChildStdout>,
    directory: TempDir,
}

/// `target/debug` or `target/release`, with the example VMM and the shim library built. Cargo does not build the cdylib for
/// this test, so it is called here.
fn build_directory() -> &'static Path {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    TARGET.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let target = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
        if std::env::var_os("SHIM_LIBRARY").is_some() {
            return target.to_owned();
        }
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--offline", "--package", "kvm-vfio-shim-preload", "--lib"]);
        cargo.args(["--example", "toy_vmm", "--target-dir"]).arg(target.parent().expect("target/PROFILE"));
        if target.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "{cargo:?}");
        target.to_owned()
    })
}

impl TestVmm {
    /// Starts a VMM with guest memory and, if there is KVM, a VM that has not run yet.
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let mut command = Command::new(build_directory().join("examples/toy_vmm"));
        let library = std::env::var_os("SHIM_LIBRARY").map(PathBuf::from);
        command.env("LD_PRELOAD", library.unwrap_or_else(|| build_directory().join("libkvm_vfio_shim.so")));
        command.env("KVM_VFIO_SHIM_SOCKET", directory.as_path().join("kvm"));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut vmm = Self { process, output, directory };
        for step in ["vm", "vcpu", "memory", "dontfork"] {
            vmm.command(step);
        }
        vmm
    }

    fn command(&mut self, line: &str) -> String {
        writeln!(self.process.stdin.as_mut().unwrap(), "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    fn socket(&self) -> String {
        self.directory.as_path().join("kvm").to_str().unwrap().to_owned()
    }

    fn status(&self) -> Status {
        Client::connect(self.socket().as_ref(), Client::DEFAULT_TIMEOUT).unwrap().1
    }

    /// Its description in the log.
    fn description(&self) -> String {
        let vm = if Path::new("/dev/kvm").exists() { "VM not started yet" } else { "no KVM VM" };
        format!("process {}, {vm}, policy lock; ", self.process.id())
    }

    /// True if a hole can be punched in its memory.
    fn can_discard_memory(&mut self) -> bool {
        let before = self.command("blocks memory");
        self.command("punch memory");
        self.command("blocks memory") != before
    }
}

impl Drop for TestVmm {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn serve(vmm: &TestVmm) -> Process {
    Process::serve_with("size=1M", &["--kvm-socket", &vmm.socket()])
}

#[test]
fn two_backends_share_one_shim_and_discards_are_blocked_until_both_have_unregistered() {
    let mut vmm = TestVmm::start();
    let (mut one, mut two) = (serve(&vmm), serve(&vmm));
    let (client_one, client_two) = (one.client(), two.client());
    assert_eq!(vmm.status().registered, 2);

    drop(client_one);
    one.wait_until("the first is unregistered", |one| one.log().contains("unregistered"));
    assert_eq!(vmm.status().registered, 1);
    assert!(!vmm.can_discard_memory());
    two.signal(Signal::KILL);
    two.wait_for_exit();
    one.wait_until("the killed one is unregistered", |_| vmm.status().registered == 0);

    drop(client_two);
    assert!(vmm.can_discard_memory());
    assert!(one.stop().status.success());
}

#[test]
fn a_backend_registers_again_with_a_running_vm_after_it_was_killed() {
    let vmm = TestVmm::start();
    let mut first = serve(&vmm);
    let _client = first.client();
    first.signal(Signal::KILL);
    first.wait_for_exit();

    let mut second = serve(&vmm);
    let mut client = second.client();

    second.wait_until("only the second is registered", |_| vmm.status().registered == 1);
    client.write(0, &[1; 512]).unwrap();
}

#[test]
fn a_registration_outlives_the_backend_that_hands_over() {
    let mut vmm = TestVmm::start();
    let socket = vmm.socket();
    let start = |process: &[&str]| Process::start(&[process, &["--kvm-socket", &socket, "--queues", "2"]].concat());
    let device = "emulated:file=DIR/disk,create=on,size=1M";
    let mut first = start(&["--socket-path", "DIR/socket", "--handover-socket", "DIR/handover", "--device", device]);
    first.wait_until("a successor can connect", |first| first.log().contains("successors may connect"));
    let mut client = first.client();
    client.write(0, &[1; 512]).unwrap();
    assert_eq!(vmm.status().registered, 1);

    let handover = first.path("handover").display().to_string();
    let same = device.replace("DIR/disk", first.path("disk").to_str().unwrap());
    let mut second = start(&["--takeover", &handover, "--device", &same]);
    let output = first.wait_for_exit();

    assert!(output.status.success() && !output.log.contains("unregistered"), "{}", output.log);
    assert_eq!(vmm.status().registered, 1, "{}", second.log());
    assert!(!vmm.can_discard_memory());
    client.write(8, &[1; 512]).unwrap();
    let goes_on = format!("emulated: KVM shim of the process before: {}1 device(s) registered", vmm.description());
    second.wait_until("it has asked the shim", |second| second.log().contains(&goes_on));
    drop(client);
    second.wait_until("it is unregistered", |second| second.log().contains("unregistered"));
    assert_eq!(vmm.status().registered, 0);
}

#[test]
fn a_backend_survives_the_death_of_the_vm() {
    let mut vmm = TestVmm::start();
    let mut process = serve(&vmm);
    let mut client = process.client();
    client.write(0, &[1; 512]).unwrap();

    vmm.process.kill().unwrap();
    process.wait_until("the log reports it", |process| process.log().contains("not kept from being discarded"));

    client.read(0, &mut [0; 512]).unwrap();
    drop(client);
    let output = process.stop();
    assert!(output.status.success(), "{}", output.log);
    assert_eq!(output.log.matches("unregistered: ").count(), 0, "{}", output.log);
}

#[test]
fn the_log_and_the_statistics_show_the_registration() {
    let vmm = TestVmm::start();
    let mut process = serve(&vmm);
    drop(process.client());
    process.wait_until("it is unregistered", |process| process.log().contains("unregistered"));

    let log = process.stop().log;

    let vm = vmm.description();
    for part in [
        &format!("emulated: KVM shim: {vm}0 device(s) registered"),
        &format!("emulated: registered: {vm}1 device(s) registered; KVM assumes coherent DMA; DMA is coherent: "),
        &format!("emulated: unregistered: {vm}0 device(s) registered"),
        " verdict=coherent kvm=coherent registrations=",
        " told=0 refused=0 discard_alarms=0",
    ] {
        assert!(log.contains(part), "{part} is not in:\n{log}");
    }
}

#[test]
fn a_front_end_in_another_process_than_the_shim_is_logged() {
    let vmm = TestVmm::start();
    let process = serve(&vmm);
    let _client = process.client();
    let both = format!("process {} listens at {}, but the front-end is process {}", vmm.process.id(), vmm.socket(), {
        std::process::id()
    });
    assert!(process.log().contains(&both), "{both} is not in:\n{}", process.log());
}

#[test]
fn inspect_shows_the_status_of_the_shim_or_why_there_is_none() {
    let vmm = TestVmm::start();
    // The function does not exist. `inspect` still shows the shim.
    let function = "ffff:ff:1f.7";
    let text = Process::run(&["inspect", function, "--kvm-socket", &vmm.socket()]).stdout;
    let json = Process::run(&["inspect", function, "--json", "--kvm-socket", &vmm.socket()]).stdout;
    let absent = Process::run(&["inspect", function, "--kvm-socket", "DIR/absent"]).stdout;
    let plain = Process::run(&["inspect", function]).stdout;

    let vm = format!("{}0 device(s) registered", vmm.description());
    assert!(text.contains(&vm), "{text}");
    let pid = format!("\"kvm\":{{\"vmm_pid\":{},", vmm.process.id());
    assert!(json.contains(&pid) && json.contains("\"registered\":0"), "{json}");
    assert!(absent.contains("LD_PRELOAD=libkvm_vfio_shim.so"), "{absent}");
    assert!(!plain.contains("kvm"), "{plain}");
    assert_eq!(vmm.status().registered, 0, "inspect registers nothing");
}
