//! On which CPUs the threads of the running program may run, as the kernel says (proc_pid_status(5)).

use std::collections::BTreeMap;

use rustix::thread::{CpuSet, sched_getaffinity};
use serde_json::{Value, json};

use crate::operator::ctl;
use crate::process::Process;
use crate::sandbox::threads;

/// The first and the last CPU that this test may use; the same one twice on a machine with one.
fn two_cpus() -> [String; 2] {
    let own = sched_getaffinity(None).unwrap();
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| own.is_set(cpu));
    let first = cpus.next().unwrap();
    [first, cpus.next_back().unwrap_or(first)].map(|cpu| cpu.to_string())
}

/// By name of the thread.
fn cpus_of(process: u32) -> BTreeMap<String, String> {
    threads(process).into_iter().map(|(name, mut status)| (name, status.remove("Cpus_allowed_list").unwrap())).collect()
}

/// Waits until each of these workers runs where it is to: one that has just been started has neither its name nor its place.
fn wait_until_placed(process: &mut Process, wanted: &[(&str, &String)]) {
    process.wait_until(&format!("{wanted:?}"), |process| {
        let cpus = cpus_of(process.id());
        wanted.iter().all(|(worker, wanted)| cpus.get(*worker) == Some(*wanted))
    });
}

#[test]
fn workers_share_a_list_that_has_too_few_cpus_for_them_and_other_threads_stay() {
    let [_, last] = two_cpus();
    let before = cpus_of(std::process::id()).into_values().next().unwrap();
    let arguments = ["--cpus", &last, "--control", "DIR/control", "--sandbox", "strict"];
    let mut process = Process::serve_with("size=1M", &arguments);
    process.client().write(0, &[1; 512]).unwrap();

    let workers = [("vdv-worker-0", &last), ("vdv-worker-1", &last)];
    let others = ["vhost-device-vf", "vdv-watchdog", "emulated-nvme", "vdv-control"].map(|name| (name, &before));
    wait_until_placed(&mut process, &[&workers[..], &others].concat());

    assert!(
        process.log().contains(&format!("emulated: workers run on CPUs {last}, because of --cpus")),
        "{}",
        process.log()
    );
    let stats = ctl(&process, &["stats"]).unwrap();
    let shown: Vec<_> = stats["workers"].as_array().unwrap().iter().map(|worker| &worker["cpus"]).collect();
    assert_eq!(shown, [&json!(last); 2]);
}

#[test]
fn a_list_with_a_cpu_for_each_worker_is_divided_also_among_several_disks() {
    let [first, last] = two_cpus();
    let wanted = format!("{first},{last}");
    if first == last {
        return; // one CPU cannot be divided
    }
    let mut one = Process::serve_with("size=1M", &["--cpus", &wanted]);
    let two = ["--namespace", "1", "--namespace", "2", "--socket-path", "DIR/socket", "--socket-path", "DIR/other"];
    let device = ["--device", "emulated:size=1M,namespaces=2,queues=2", "--queues", "1", "--cpus", &wanted];
    let mut several = Process::start(&[&two[..], &device].concat());
    several.wait_until("it serves", |process| process.log().matches("] serving ").count() == 2);

    wait_until_placed(&mut one, &[("vdv-worker-0", &first), ("vdv-worker-1", &last)]);
    wait_until_placed(&mut several, &[("disk 0 worker 0", &first), ("disk 1 worker 0", &last)]);
}

#[test]
fn without_a_list_the_workers_of_an_emulated_drive_run_wherever_the_program_does() {
    let mut process = Process::serve_with("size=1M", &["--control", "DIR/control"]);
    let own = cpus_of(process.id()).remove("vhost-device-vf").unwrap();
    process.client().write(0, &[1; 512]).unwrap();
    wait_until_placed(&mut process, &[("vdv-worker-0", &own), ("vdv-worker-1", &own)]);
    assert!(!process.log().contains("workers run on"), "{}", process.log());
    assert_eq!(ctl(&process, &["stats"]).unwrap()["workers"][0]["cpus"], Value::Null);
}

#[test]
fn a_list_that_cannot_be_used_is_refused_before_anything_is_created() {
    let arguments = ["--device", "emulated:size=1M", "--socket-path", "DIR/socket", "--cpus", "1023"];
    let mut process = Process::start(&arguments);
    let output = process.wait_for_exit();
    assert_eq!(output.status.code(), Some(1), "{}", output.log);
    assert!(output.log.contains("--cpus 1023: this process may use none of these, only "), "{}", output.log);
    assert!(output.log.contains("AllowedCPUs="), "{}", output.log);
    assert!(!process.path("socket").exists());
}
