//! The library preloaded into a minimal VMM, with a client at its socket. Without /dev/kvm, the
//! tests that need a VM say so and pass; scripts/test runs them where there is one.
#![expect(clippy::unwrap_used, reason = "a test may")]

mod library;
mod test_vmm;

use std::path::Path;

use test_vmm::TestVmm;

fn has_kvm() -> bool {
    let exists = Path::new("/dev/kvm").exists();
    if !exists {
        println!("no /dev/kvm here: not tested");
    }
    exists
}

#[test]
fn the_shim_sees_the_vm_and_the_first_run() {
    if !has_kvm() {
        return;
    }
    let mut vmm = TestVmm::start(&[]);
    assert!(vmm.run("vm").parse::<u32>().is_ok());
    let (mut client, status) = vmm.client();
    assert_eq!((status.vms, status.started_ms, status.vmm_pid), (1, 0, vmm.pid()));

    vmm.run("vcpu");
    assert_eq!(client.query().unwrap().started_ms, 0, "the vCPU has not run yet");
    assert_eq!(vmm.run("run"), "0");
    let started = client.query().unwrap().started_ms;
    assert!(started > 0);
    vmm.run("run");
    assert_eq!(client.query().unwrap().started_ms, started, "the time of the first run is kept");
}

#[test]
fn the_vmm_behaves_the_same_with_and_without_the_library() {
    if !has_kvm() {
        return;
    }
    let script =
        ["vm", "vcpu", "run", "vfio-test", "vfio", "memory", "punch memory", "blocks memory", "no-such-command"];
    let (mut bare, mut hooked) = (TestVmm::bare(), TestVmm::start(&[]));
    for command in script {
        let (bare, hooked) = (bare.run(command), hooked.run(command));
        // Descriptor numbers differ, because the shim has some of its own.
        let same = bare == hooked || (bare.parse::<u32>().is_ok() && hooked.parse::<u32>().is_ok());
        assert!(same, "{command}: {bare} without, {hooked} with the library");
    }
}

#[test]
fn the_vmm_gets_the_vms_only_vfio_device_each_time_it_creates_one() {
    if !has_kvm() {
        return;
    }
    let mut vmm = TestVmm::start(&[]);
    vmm.run("vm");
    assert_eq!(vmm.run("vfio-test"), "0", "the test creates none");
    assert_eq!(vmm.run("vfio"), "0");
    assert_eq!(vmm.run("vfio"), "0", "another descriptor of the same device, where KVM would return EBUSY");
    assert_eq!(vmm.run("close vfio"), "0");
    assert_eq!(vmm.run("vfio"), "0");
}

#[test]
fn the_status_counts_the_vms_that_exist() {
    if !has_kvm() {
        return;
    }
    let mut vmm = TestVmm::start(&[]);
    vmm.run("vm");
    vmm.run("vm second");
    let (mut client, status) = vmm.client();
    assert_eq!(status.vms, 2);
    vmm.run("close second");
    assert_eq!(client.query().unwrap().vms, 1, "as after probing processor features");
    vmm.run("close vm");
    assert_eq!(client.query().unwrap().vms, 0);
    vmm.run("vm");
    assert_eq!(client.query().unwrap().vms, 1);
}

#[test]
fn guest_memory_keeps_its_pages_only_while_a_device_can_access_it() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("dontfork");
    let before = vmm.run("blocks memory");
    assert_ne!(before, "0");

    let (mut client, _) = vmm.client();
    let registration = client.register_coherent().unwrap();
    for discard in ["punch memory", "madvise memory remove", "madvise memory dontneed"] {
        assert_eq!(vmm.run(discard), "0", "{discard}");
        assert_eq!(
            (vmm.run("blocks memory"), vmm.run("first-byte memory")),
            (before.clone(), "120".into()),
            "{discard}"
        );
    }

    client.unregister(registration.handle).unwrap();
    assert_eq!(vmm.run("punch memory"), "0");
    assert_eq!((vmm.run("blocks memory"), vmm.run("first-byte memory")), ("0".into(), "0".into()));
}

#[test]
fn madv_remove_works_again_after_the_device_is_unregistered() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("dontfork");
    let (mut client, _) = vmm.client();
    let registration = client.register_coherent().unwrap();
    client.unregister(registration.handle).unwrap();
    assert_eq!(vmm.run("madvise memory remove"), "0");
    assert_eq!(vmm.run("blocks memory"), "0");
}

#[test]
fn holes_in_files_other_than_guest_memory_are_still_punched() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("image");
    vmm.run("dontfork");
    let (mut client, _) = vmm.client();
    client.register_coherent().unwrap();

    assert_eq!(vmm.run("punch memory"), "0");
    assert_eq!(vmm.run("punch image"), "0");

    assert_eq!(vmm.run("blocks image"), "0", "a block driver relies on the zeroes");
    assert_ne!(vmm.run("blocks memory"), "0");
    assert_eq!(vmm.run("punch nothing"), format!("errno {}", libc::EBADF));
}

#[test]
fn private_memory_is_still_discarded() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("private");
    vmm.run("dontfork");
    let (mut client, _) = vmm.client();
    client.register_coherent().unwrap();
    assert_eq!(vmm.run("madvise private dontneed"), "0");
    assert_eq!(vmm.run("first-byte private"), "0", "an allocator relies on the zeroes");
}

#[test]
fn discards_work_again_after_the_client_has_disconnected() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("dontfork");
    let (mut watcher, _) = vmm.client();
    let (mut client, _) = vmm.client();
    client.register_coherent().unwrap();
    drop(client);
    while watcher.query().unwrap().registered > 0 {
        std::thread::sleep(std::time::Duration::from_millis(60));
    }
    assert_eq!(vmm.run("punch memory"), "0");
    assert_eq!(vmm.run("blocks memory"), "0");
}

#[test]
fn the_servers_thread_blocks_every_signal_it_can() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("dontfork");
    let _client = vmm.client();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap();
    let status = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let (shim, other): (Vec<_>, Vec<_>) = status.partition(|status| status.starts_with("Name:\tkvm-vfio-shim"));
    let blocked = |status: &String| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a mask");
        u64::from_str_radix(mask.trim(), 16).expect("hexadecimal")
    };
    assert_eq!((shim.len(), other.len()), (1, 1));
    // All but KILL, STOP and the two that libc reserves.
    assert_eq!(blocked(&shim[0]), !((1 << 8) | (1 << 18) | (1 << 31) | (1 << 32)));
    assert_eq!(blocked(&other[0]), 0, "the VMM's own mask is unchanged");
}

#[test]
fn a_process_without_a_vm_does_not_listen() {
    let mut vmm = TestVmm::start(&[]);
    vmm.run("memory");
    vmm.run("punch memory");
    assert!(!vmm.socket().exists());
}

#[test]
fn an_invalid_setting_is_logged_and_the_vmm_keeps_running() {
    for (name, value) in
        [("KVM_VFIO_SHIM_POLICY", "loose"), ("KVM_VFIO_SHIM_UID", "root"), ("KVM_VFIO_SHIM_SOCKET", "/no/such/x")]
    {
        let mut vmm = TestVmm::start(&[(name, value)]);
        vmm.run("memory");
        assert_eq!(vmm.run("dontfork"), "0");
        let log = vmm.end();
        assert!(log.contains(value) && log.contains("not serving"), "{log}");
    }
}
