use proptest::prelude::*;
use vmm_sys_util::tempdir::TempDir;

use super::*;

fn list(text: &str) -> CpuList {
    CpuList::of_sysfs(text).unwrap()
}

fn facts(wanted: Option<&str>, own: &str, node: Option<(u32, &str)>) -> Facts {
    let node = node.map(|(number, cpus)| Node { number, cpus: list(cpus) });
    Facts { list: wanted.map(list), permitted: list("0-7"), own: list(own), node }
}

#[test]
fn workers_run_on_the_drives_node_as_far_as_this_process_does() {
    let choice = choose(&facts(None, "0-5", Some((1, "4-7")))).unwrap();
    assert_eq!(choice, Choice::Node(1, list("4-5")));
    assert_eq!(choice.to_string(), "workers run on CPUs 4-5, because the drive is on NUMA node 1");
    assert_eq!(choice.placement().of_worker(1, 2), Some(list("4-5")), "not divided: the scheduler distributes them");
}

#[test]
fn without_a_cpu_of_the_node_workers_run_where_the_process_does_and_a_line_says_why() {
    for cpus in ["4-7", ""] {
        let choice = choose(&facts(None, "0-3", Some((1, cpus)))).unwrap();
        assert_eq!(choice.placement(), Placement::default());
        let line = choice.to_string();
        assert!(line.contains("run on CPUs 0-3, although the drive is on NUMA node 1"), "{line}");
        assert!(line.contains("or give --cpus"), "{line}");
    }
}

#[test]
fn a_drive_without_a_node_restricts_nothing() {
    let choice = choose(&facts(None, "0-3", None)).unwrap();
    assert_eq!(choice, Choice::NoNode(list("0-3")));
    assert_eq!(choice.placement().of_worker(0, 1), None);
}

#[test]
fn a_list_counts_more_than_the_node_and_the_affinity() {
    let choice = choose(&facts(Some("6-9"), "0-1", Some((0, "0-3")))).unwrap();
    assert_eq!(choice, Choice::List(list("6-7")), "what does not exist is left out");
    assert_eq!(choice.to_string(), "workers run on CPUs 6-7, because of --cpus");
}

#[test]
fn a_list_without_a_permitted_cpu_is_an_error_that_names_both_and_the_fix() {
    let error = choose(&facts(Some("8-9"), "0-1", None)).unwrap_err().to_string();
    for part in ["--cpus 8-9", "only 0-7", "AllowedCPUs="] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_list_is_divided_if_there_is_a_cpu_for_each_worker() {
    let shares = |cpus: &str, workers| -> Vec<String> {
        let placement = Choice::List(list(cpus)).placement();
        (0..workers).map(|worker| placement.of_worker(worker, workers).unwrap().to_string()).collect()
    };
    assert_eq!(shares("2-5", 1), ["2-5"]);
    assert_eq!(shares("2-5", 2), ["2-3", "4-5"]);
    assert_eq!(shares("2,4,9", 2), ["2", "4,9"]);
    assert_eq!(shares("2-3,8", 3), ["2", "3", "8"]);
    assert_eq!(shares("2-3", 3), ["2-3", "2-3", "2-3"], "all share it");
}

proptest! {
    #[test]
    fn a_divided_list_is_used_up_and_no_cpu_is_anothers(
        cpus in proptest::collection::btree_set(0..64_usize, 1..20),
        workers in 1..20_usize,
    ) {
        prop_assume!(cpus.len() >= workers);
        let placement = Choice::List(cpus.iter().copied().collect()).placement();
        let shares: Vec<_> = (0..workers).map(|worker| placement.of_worker(worker, workers).unwrap()).collect();
        prop_assert!(shares.iter().all(|share| !share.is_empty()));
        prop_assert!(shares.iter().flat_map(CpuList::iter).eq(cpus));
    }
}

#[test]
fn the_node_of_a_device_is_what_sysfs_says() {
    let directory = TempDir::new().unwrap();
    let write = |name, text| fs::write(directory.as_path().join(name), text).unwrap();
    assert_eq!(Node::of_device(directory.as_path()), None, "no such file");
    write("local_cpulist", "0-7\n");
    write("numa_node", "-1\n");
    assert_eq!(Node::of_device(directory.as_path()), None, "no node");
    write("numa_node", "1\n");
    assert_eq!(Node::of_device(directory.as_path()), Some(Node { number: 1, cpus: list("0-7") }));
    write("local_cpulist", "\n");
    assert_eq!(Node::of_device(directory.as_path()), Some(Node { number: 1, cpus: CpuList::EMPTY }));
}

#[test]
fn a_thread_runs_where_it_is_placed_and_asking_what_is_permitted_changes_nothing() {
    let before = own().unwrap();
    let last: CpuList = before.iter().last().into_iter().collect();
    let thread = std::thread::spawn(move || {
        run_on(&last).unwrap();
        let permitted = permitted().unwrap();
        (permitted, own().unwrap())
    });
    let (permitted, placed) = thread.join().unwrap();
    assert_eq!((before.common(&permitted), placed), (before, last), "more is permitted than it has");
    assert_eq!(own().unwrap(), before, "only that thread is placed");
}
