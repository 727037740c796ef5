//! What the running program has given up, and what it can do nevertheless. All tests of this directory run with the default
//! `--sandbox auto`; these look at it.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Signal;
use testbed::client::{Client, Shape};

use crate::process::{PROGRAM, Process};

/// All threads of a process: name, and the lines of their `status` (proc_pid_status(5)).
pub(crate) fn threads(process: u32) -> Vec<(String, BTreeMap<String, String>)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let lines = |text: String| -> BTreeMap<String, String> {
        text.lines()
            .filter_map(|line| line.split_once(":\t"))
            .map(|(name, value)| (name.into(), value.into()))
            .collect()
    };
    statuses.map(lines).map(|status| (status["Name"].clone(), status)).collect()
}

/// The processes that it has started.
fn children(process: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // proc_pid_stat(5): the name is in parentheses, then come state and parent.
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    all.filter(|pid| parent(*pid) == Some(process)).collect()
}

fn descriptors(process: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
    let named = entries.filter_map(|entry| Some((entry.file_name(), fs::read_link(entry.path()).ok()?)));
    named.map(|(number, link)| format!("{}={}", number.display(), link.display())).collect()
}

const EVERYTHING: [&str; 6] =
    ["--control", "DIR/control", "--metrics", "DIR/metrics", "--handover-socket", "DIR/handover"];

#[test]
fn every_thread_of_a_serving_process_is_filtered_and_has_no_capability() {
    let mut process = Process::serve_with("size=1M", &EVERYTHING);
    let mut client = process.client();
    client.write(0, &[1; 512]).unwrap();
    process.wait_until("it is in its sandbox", |process| process.log().contains("sandbox: no capability"));

    let threads = threads(process.id());

    let names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    for name in [
        "vhost-device-vf",
        "vdv-worker-0",
        "vdv-worker-1",
        "vdv-watchdog",
        "emulated-nvme",
        "vdv-control",
        "vdv-metrics",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    for (name, status) in &threads {
        let found = ["Seccomp", "NoNewPrivs", "CapPrm", "CapEff", "CapInh", "CapAmb"].map(|line| status[line].as_str());
        let none = "0000000000000000";
        assert_eq!(found, ["2", "1", none, none, none, none], "{name}");
    }
}

#[test]
fn strict_serves_where_the_kernel_has_all_layers() {
    let mut process = Process::serve_with("size=1M", &["--sandbox", "strict"]);
    process.client().write(0, &[1; 512]).unwrap();
    process.wait_until("it says so", |process| {
        process.log().contains("sandbox: no capability, no new privileges, landlock, seccomp")
    });
    assert!(process.stop().status.success());
}

#[test]
fn without_a_sandbox_there_is_no_helper_and_no_filter() {
    let process = Process::serve_with("size=1M", &["--sandbox", "off"]);
    let own = &threads(std::process::id())[0].1["Seccomp"];
    for (name, status) in threads(process.id()) {
        assert_eq!(&status["Seccomp"], own, "{name}: what it has inherited");
    }
    assert_eq!(children(process.id()), [0_u32; 0]);
    assert!(!process.log().contains("sandbox:"));
}

#[test]
fn the_helper_has_no_descriptor_of_the_program_and_ends_with_it() {
    let mut process = Process::serve("size=1M");
    let _client = process.client();
    let [helper] = children(process.id())[..] else { panic!("one helper: {:?}", children(process.id())) };
    let held = descriptors(helper);
    assert_eq!(held.len(), 4, "standard ones and the way to the program: {held:?}");
    assert!(held.iter().any(|fd| fd == "0=/dev/null"), "{held:?}");

    process.signal(Signal::KILL);
    process.wait_for_exit();

    let gone = || !fs::exists(format!("/proc/{helper}")).unwrap();
    for _ in 0..2000 {
        if gone() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the helper is still there");
}

#[test]
fn signals_that_end_the_program_do_not_end_the_helper_before() {
    let mut process = Process::serve("size=1M");
    let [helper] = children(process.id())[..] else { panic!("one helper") };
    for signal in [Signal::TERM, Signal::INT, Signal::USR2] {
        rustix::process::kill_process(rustix::process::Pid::from_raw(helper.cast_signed()).unwrap(), signal).unwrap();
    }
    // The helper starts a successor, which cannot take the disk over: it is memory of this process.
    process.signal(Signal::USR2);
    process.wait_until("the helper has started a process", |process| {
        process.log().contains("SIGUSR2: started the successor, process ")
    });
    assert!(process.stop().status.success());
}

/// The program with these descriptors, as the service manager passes them.
fn passing(names: &[&str], fds: Vec<OwnedFd>, arguments: &[&str]) -> Process {
    let mut shell = Command::new("/bin/sh");
    let variables = format!("LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}", names.len(), names.join(":"));
    shell.arg("-c").arg(format!("{variables} exec \"$0\" \"$@\"")).arg(PROGRAM);
    let mappings = (3..).zip(fds).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    shell.fd_mappings(mappings).unwrap();
    Process::spawn(shell, arguments)
}

#[test]
fn front_ends_and_operators_are_served_on_sockets_that_were_passed_in() {
    let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let path = |name: &str| directory.as_path().join(name);
    let fds = ["control", "socket"].map(|name| UnixListener::bind(path(name)).unwrap().into());
    let mut process =
        passing(&["control", "disk.socket"], fds.into(), &["--device", "emulated:size=1M", "--sandbox", "strict"]);

    let mut client = Client::new(UnixStream::connect(path("socket")).unwrap(), Shape::default()).unwrap();
    client.write(0, &[1; 512]).unwrap();
    let control = path("control").display().to_string();
    let status = Process::run(&["ctl", "--json", "--socket", &control, "status"]);

    assert!(status.status.success() && status.stdout.contains("vhost-user-blk"), "{} {}", status.stdout, status.log);
    assert!(process.stop().status.success());
    assert!(path("control").exists(), "its creator removes it");
}

#[test]
fn a_passed_in_control_socket_and_a_path_exclude_each_other() {
    let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let control = UnixListener::bind(directory.as_path().join("control")).unwrap().into();
    let arguments = ["--device", "emulated:size=1M", "--socket-path", "DIR/socket", "--control", "DIR/control"];
    let output = passing(&["control"], vec![control], &arguments).wait_for_exit();
    assert!(
        output.log.contains("a socket named control was passed as well; leave that argument out"),
        "{}",
        output.log
    );
}

#[test]
fn a_device_that_was_not_passed_in_or_is_none_is_refused() {
    let arguments = ["--device", "fd", "--socket-path", "DIR/socket"];
    let output = Process::run(&arguments);
    assert!(output.log.contains("OpenFile=/dev/vfio/devices/vfioN:device"), "{}", output.log);
    let null = fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let iommu = null.try_clone().unwrap();
    let output = passing(&["device", "iommu"], vec![null.into(), iommu.into()], &arguments).wait_for_exit();
    assert!(output.log.contains("IOMMU_IOAS_ALLOC"), "{}", output.log);
    let output = Process::run(&["--device", "fd=99", "--socket-path", "DIR/socket"]);
    assert!(output.log.contains("--device fd 99: "), "{}", output.log);
}
