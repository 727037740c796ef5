//! The library as a VMM gets it: preloaded into a toy VMM, with a client at its socket. Where there is no /dev/kvm, the
//! tests that need a VM say so and pass; scripts/test runs them where there is one.
#![expect(clippy::unwrap_used, reason = "a test may")]

mod library;
mod toy;

use std::path::Path;

use toy::Toy;

fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    if !there {
        println!("no /dev/kvm here: not tested");
    }
    there
}

#[test]
fn the_vm_and_the_first_run_are_seen() {
    if !kvm() {
        return;
    }
    let mut toy = Toy::start(&[]);
    assert!(toy.say("vm").parse::<u32>().is_ok());
    let (mut client, status) = toy.client();
    assert_eq!((status.vms, status.started_ms, status.vmm_pid), (1, 0, toy.pid()));

    toy.say("vcpu");
    assert_eq!(client.query().unwrap().started_ms, 0, "a vCPU that has not run");
    assert_eq!(toy.say("run"), "0");
    let started = client.query().unwrap().started_ms;
    assert!(started > 0);
    toy.say("run");
    assert_eq!(client.query().unwrap().started_ms, started, "the first one counts");
}

#[test]
fn without_a_preloaded_library_the_toy_behaves_the_same() {
    if !kvm() {
        return;
    }
    let script = ["vm", "vcpu", "run", "vfio-test", "vfio", "memory", "punch memory", "blocks memory", "what"];
    let (mut bare, mut hooked) = (Toy::bare(), Toy::start(&[]));
    for command in script {
        let (bare, hooked) = (bare.say(command), hooked.say(command));
        // Descriptors are numbered differently: the shim has some of its own.
        let same = bare == hooked || (bare.parse::<u32>().is_ok() && hooked.parse::<u32>().is_ok());
        assert!(same, "{command}: {bare} without, {hooked} with the library");
    }
}

#[test]
fn the_vmm_gets_the_vms_one_vfio_device_as_often_as_it_asks() {
    if !kvm() {
        return;
    }
    let mut toy = Toy::start(&[]);
    toy.say("vm");
    assert_eq!(toy.say("vfio-test"), "0", "asking makes none");
    assert_eq!(toy.say("vfio"), "0");
    assert_eq!(toy.say("vfio"), "0", "another descriptor of the same device, where KVM would say EBUSY");
    assert_eq!(toy.say("close vfio"), "0");
    assert_eq!(toy.say("vfio"), "0");
}

#[test]
fn a_second_vm_is_refused_until_one_has_gone() {
    if !kvm() {
        return;
    }
    let mut toy = Toy::start(&[]);
    toy.say("vm");
    toy.say("vm second");
    let (mut client, status) = toy.client();
    assert_eq!(status.vms, 2);
    toy.say("close second");
    assert_eq!(client.query().unwrap().vms, 1, "as after probing processor features");
    toy.say("close vm");
    assert_eq!(client.query().unwrap().vms, 0);
    toy.say("vm");
    assert_eq!(client.query().unwrap().vms, 1);
}

#[test]
fn guest_memory_keeps_its_pages_while_a_device_reaches_it_and_only_then() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("dontfork");
    let before = toy.say("blocks memory");
    assert_ne!(before, "0");

    let (mut client, _) = toy.client();
    let registration = client.register_coherent().unwrap();
    for discard in ["punch memory", "madvise memory remove", "madvise memory dontneed"] {
        assert_eq!(toy.say(discard), "0", "{discard}");
        assert_eq!(
            (toy.say("blocks memory"), toy.say("first-byte memory")),
            (before.clone(), "120".into()),
            "{discard}"
        );
    }

    client.unregister(registration.handle).unwrap();
    assert_eq!(toy.say("punch memory"), "0");
    assert_eq!((toy.say("blocks memory"), toy.say("first-byte memory")), ("0".into(), "0".into()));
}

#[test]
fn remove_works_again_after_the_device_has_gone() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("dontfork");
    let (mut client, _) = toy.client();
    let registration = client.register_coherent().unwrap();
    client.unregister(registration.handle).unwrap();
    assert_eq!(toy.say("madvise memory remove"), "0");
    assert_eq!(toy.say("blocks memory"), "0");
}

#[test]
fn holes_in_files_that_are_no_guest_memory_are_punched_all_the_same() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("image");
    toy.say("dontfork");
    let (mut client, _) = toy.client();
    client.register_coherent().unwrap();

    assert_eq!(toy.say("punch memory"), "0");
    assert_eq!(toy.say("punch image"), "0");

    assert_eq!(toy.say("blocks image"), "0", "a block driver counts on the zeroes");
    assert_ne!(toy.say("blocks memory"), "0");
    assert_eq!(toy.say("punch nothing"), format!("errno {}", libc::EBADF));
}

#[test]
fn private_memory_is_discarded_all_the_same() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("private");
    toy.say("dontfork");
    let (mut client, _) = toy.client();
    client.register_coherent().unwrap();
    assert_eq!(toy.say("madvise private dontneed"), "0");
    assert_eq!(toy.say("first-byte private"), "0", "an allocator counts on the zeroes");
}

#[test]
fn a_client_that_is_killed_gives_discards_back() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("dontfork");
    let (mut watcher, _) = toy.client();
    let (mut client, _) = toy.client();
    client.register_coherent().unwrap();
    drop(client);
    while watcher.query().unwrap().registered > 0 {
        std::thread::sleep(std::time::Duration::from_millis(60));
    }
    assert_eq!(toy.say("punch memory"), "0");
    assert_eq!(toy.say("blocks memory"), "0");
}

#[test]
fn the_servers_thread_blocks_every_signal_it_can() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("dontfork");
    let _client = toy.client();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", toy.pid())).unwrap();
    let status = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let (shim, other): (Vec<_>, Vec<_>) = status.partition(|status| status.starts_with("Name:\tkvm-vfio-shim"));
    let blocked = |status: &String| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a mask");
        u64::from_str_radix(mask.trim(), 16).expect("hexadecimal")
    };
    assert_eq!((shim.len(), other.len()), (1, 1));
    // All but KILL, STOP and the two that libc keeps for itself.
    assert_eq!(blocked(&shim[0]), !((1 << 8) | (1 << 18) | (1 << 31) | (1 << 32)));
    assert_eq!(blocked(&other[0]), 0, "the VMM's own mask is as before");
}

#[test]
fn a_process_without_a_vm_serves_nobody() {
    let mut toy = Toy::start(&[]);
    toy.say("memory");
    toy.say("punch memory");
    assert!(!toy.socket().exists());
}

#[test]
fn a_bad_setting_is_named_and_the_vmm_runs_on() {
    for (name, value) in
        [("KVM_VFIO_SHIM_POLICY", "loose"), ("KVM_VFIO_SHIM_UID", "root"), ("KVM_VFIO_SHIM_SOCKET", "/no/such/x")]
    {
        let mut toy = Toy::start(&[(name, value)]);
        toy.say("memory");
        assert_eq!(toy.say("dontfork"), "0");
        let log = toy.end();
        assert!(log.contains(value) && log.contains("not serving"), "{log}");
    }
}
