//! Two backends and one VM, as processes: what the VM's process hears, what it no longer does, and what the log says.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use kvm_vfio_shim::{Client, Status};
use rustix::process::Signal;
use vmm_sys_util::tempdir::TempDir;

use crate::process::Process;

/// A VMM of the shim's own tests (frontend-shim/preload/examples/toy_vmm.rs) with the library preloaded.
struct Toy {
    process: Child,
    output: BufReader<ChildStdout>,
    directory: TempDir,
}

/// `target/debug` or `target/release`, with toy and library in it. No test can link a cdylib, so Cargo is asked here.
fn built() -> &'static Path {
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

impl Toy {
    /// Guest memory, and KVM with a VM that has not run, where there is KVM.
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let mut command = Command::new(built().join("examples/toy_vmm"));
        let library = std::env::var_os("SHIM_LIBRARY").map(PathBuf::from);
        command.env("LD_PRELOAD", library.unwrap_or_else(|| built().join("libkvm_vfio_shim.so")));
        command.env("KVM_VFIO_SHIM_SOCKET", directory.as_path().join("kvm"));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut toy = Self { process, output, directory };
        for step in ["vm", "vcpu", "memory", "dontfork"] {
            toy.say(step);
        }
        toy
    }

    fn say(&mut self, command: &str) -> String {
        writeln!(self.process.stdin.as_mut().unwrap(), "{command}").unwrap();
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

    /// How the log speaks of it.
    fn words(&self) -> String {
        let vm = if Path::new("/dev/kvm").exists() { "VM not started yet" } else { "no KVM VM" };
        format!("process {}, {vm}, policy lock; ", self.process.id())
    }

    /// True if a hole can be punched into its memory.
    fn loses_memory(&mut self) -> bool {
        let before = self.say("blocks memory");
        self.say("punch memory");
        self.say("blocks memory") != before
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn serve(toy: &Toy) -> Process {
    Process::serve_with("size=1M", &["--kvm-socket", &toy.socket()])
}

#[test]
fn two_backends_share_one_shim_and_memory_is_kept_until_both_have_gone() {
    let mut toy = Toy::start();
    let (mut one, mut two) = (serve(&toy), serve(&toy));
    let (client_one, client_two) = (one.client(), two.client());
    assert_eq!(toy.status().registered, 2);

    drop(client_one);
    one.wait_until("its front-end has left", |one| one.log().contains("unregistered"));
    assert_eq!(toy.status().registered, 1);
    assert!(!toy.loses_memory());
    two.signal(Signal::KILL);
    two.end();
    one.wait_until("the killed one's registration has gone", |_| toy.status().registered == 0);

    drop(client_two);
    assert!(toy.loses_memory());
    assert!(one.stop().status.success());
}

#[test]
fn a_backend_that_was_killed_registers_again_with_the_vm_that_lives_on() {
    let toy = Toy::start();
    let mut first = serve(&toy);
    let _client = first.client();
    first.signal(Signal::KILL);
    first.end();

    let mut second = serve(&toy);
    let mut client = second.client();

    second.wait_until("only the second is registered", |_| toy.status().registered == 1);
    client.write(0, &[1; 512]).unwrap();
}

#[test]
fn a_vm_that_is_killed_is_not_missed() {
    let mut toy = Toy::start();
    let mut process = serve(&toy);
    let mut client = process.client();
    client.write(0, &[1; 512]).unwrap();

    toy.process.kill().unwrap();
    process.wait_until("it is noticed", |process| process.log().contains("not kept from being discarded"));

    client.read(0, &mut [0; 512]).unwrap();
    drop(client);
    let ended = process.stop();
    assert!(ended.status.success(), "{}", ended.log);
    assert_eq!(ended.log.matches("unregistered: ").count(), 0, "{}", ended.log);
}

#[test]
fn the_log_and_the_statistics_say_what_the_vm_was_told() {
    let toy = Toy::start();
    let mut process = serve(&toy);
    drop(process.client());
    process.wait_until("it is unregistered", |process| process.log().contains("unregistered"));

    let log = process.stop().log;

    let vm = toy.words();
    for part in [
        &format!("emulated: KVM shim: {vm}0 device(s) registered"),
        &format!("emulated: registered: {vm}1 device(s) registered; KVM takes DMA for coherent; DMA is coherent: "),
        &format!("emulated: unregistered: {vm}0 device(s) registered"),
        " verdict=coherent kvm=coherent registrations=",
        " told=0 refused=0 discard_alarms=0",
    ] {
        assert!(log.contains(part), "{part} is not in:\n{log}");
    }
}

#[test]
fn a_front_end_of_another_process_than_the_shims_is_remarked_on() {
    let toy = Toy::start();
    let process = serve(&toy);
    let _client = process.client();
    let both = format!("process {} listens at {}, but the front-end is process {}", toy.process.id(), toy.socket(), {
        std::process::id()
    });
    assert!(process.log().contains(&both), "{both} is not in:\n{}", process.log());
}

#[test]
fn inspect_shows_what_the_shim_says_or_why_there_is_nothing_to_show() {
    let toy = Toy::start();
    // A function that is nowhere: what can be said without it is said.
    let function = "ffff:ff:1f.7";
    let text = Process::run(&["inspect", function, "--kvm-socket", &toy.socket()]).stdout;
    let json = Process::run(&["inspect", function, "--json", "--kvm-socket", &toy.socket()]).stdout;
    let nobody = Process::run(&["inspect", function, "--kvm-socket", "DIR/nobody"]).stdout;
    let plain = Process::run(&["inspect", function]).stdout;

    let vm = format!("{}0 device(s) registered", toy.words());
    assert!(text.contains(&vm), "{text}");
    let pid = format!("\"kvm\":{{\"vmm_pid\":{},", toy.process.id());
    assert!(json.contains(&pid) && json.contains("\"registered\":0"), "{json}");
    assert!(nobody.contains("LD_PRELOAD=libkvm_vfio_shim.so"), "{nobody}");
    assert!(!plain.contains("kvm"), "{plain}");
    assert_eq!(toy.status().registered, 0, "asking registers nothing");
}
