//! Hosts that lack something, as files below a directory.

use vmm_sys_util::tempdir::TempDir;

use std::fs;

use landlock::{ABI, LandlockStatus};

use super::*;

/// A host with these files. A name that ends with / is a directory.
fn host(files: &[(&str, &str)]) -> (Host, TempDir) {
    let directory = TempDir::new().unwrap();
    for (name, text) in files {
        let path = directory.as_path().join(name);
        if name.ends_with('/') {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
    (Host { root: directory.as_path().to_owned() }, directory)
}

fn outcome(check: fn(&Host) -> Finding, files: &[(&str, &str)]) -> (Outcome, String) {
    let (host, _directory) = host(files);
    let finding = check(&host);
    (finding.outcome, finding.to_string())
}

#[test]
fn an_old_kernel_is_a_problem_and_one_without_iommufd_is_noted() {
    let kernel = |release| outcome(host::kernel, &[("proc/sys/kernel/osrelease", release)]);
    assert_eq!(kernel("6.6.0-rc1\n").0, Outcome::Ok);
    assert_eq!(kernel("10.0-custom\n").0, Outcome::Ok, "numbers, not digits");
    assert_eq!(kernel("6.1.0-18-amd64\n").0, Outcome::Note);
    assert_eq!(kernel("5.10.0\n").0, Outcome::Problem);
    assert_eq!(kernel("strange\n").0, Outcome::Note);
}

#[test]
fn a_host_without_groups_is_told_how_to_turn_its_iommu_on() {
    let on = outcome(host::iommu, &[("sys/kernel/iommu_groups/0/", ""), ("sys/class/iommu/dmar0/", "")]);
    assert_eq!(on, (Outcome::Ok, "ok       iommu                1 groups behind dmar0".to_owned()));
    let (intel, text) = outcome(host::iommu, &[("proc/cpuinfo", "vendor_id : GenuineIntel")]);
    assert!(intel == Outcome::Problem && text.contains("intel_iommu=on"), "{text}");
    let (amd, text) = outcome(host::iommu, &[("proc/cpuinfo", "vendor_id : AuthenticAMD")]);
    assert!(amd == Outcome::Problem && text.contains("AMD-Vi"), "{text}");
}

#[test]
fn interrupts_must_be_remapped_or_that_must_be_waived() {
    let remapped = ("proc/interrupts", " 24:  5  IR-PCI-MSI 65536-edge nvme0q0\n");
    let not = ("proc/interrupts", "  1:  9  IO-APIC 1-edge i8042\n");
    let waived = ("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    assert_eq!(outcome(host::interrupt_remapping, &[remapped]).0, Outcome::Ok);
    assert_eq!(outcome(host::interrupt_remapping, &[not]).0, Outcome::Problem);
    assert_eq!(outcome(host::interrupt_remapping, &[not, waived]).0, Outcome::Note);
    assert_eq!(outcome(host::interrupt_remapping, &[("proc/interrupts", " 1: 2 GICv3 27 Level\n")]).0, Outcome::Ok);
}

#[test]
fn memory_that_cannot_be_locked_is_a_problem_unless_a_capability_lifts_the_limit() {
    let limits = |soft| ("proc/self/limits", ["Max locked memory         ", soft, " unlimited bytes\n"].concat());
    let found = |soft, capabilities| {
        let (name, text) = limits(soft);
        outcome(host::locked_memory, &[(name, &text), ("proc/self/status", capabilities)])
    };
    assert_eq!(found("unlimited", "CapEff:\t0\n").0, Outcome::Ok);
    assert_eq!(found("65536", "CapEff:\t0000000000004000\n").0, Outcome::Ok, "CAP_IPC_LOCK");
    assert_eq!(found("8388608", "CapEff:\t0\n").0, Outcome::Note);
    let (outcome, text) = found("65536", "CapEff:\tffffffffffffbfff\n");
    assert!(outcome == Outcome::Problem && text.contains("ulimit -l unlimited"), "{text}");
}

#[test]
fn a_layer_that_the_sandbox_lacks_is_noted_with_its_fix() {
    let of = |finding: Finding| (finding.outcome, finding.to_string());
    let enabled = LandlockStatus::Available { effective_abi: ABI::V6, kernel_abi: None };
    let newer = LandlockStatus::Available { effective_abi: ABI::V6, kernel_abi: Some(17) };
    assert_eq!(of(sandbox::landlock(Some(enabled))), (Outcome::Ok, "ok       landlock             ABI 6".to_owned()));
    assert!(of(sandbox::landlock(Some(newer))).1.ends_with("ABI 17"), "the kernel's number");
    for (status, fix) in [
        (Some(LandlockStatus::NotEnabled), "lsm=landlock"),
        (Some(LandlockStatus::NotImplemented), "CONFIG_SECURITY_LANDLOCK=y"),
        (None, "seccomp profile"),
    ] {
        let (outcome, text) = of(sandbox::landlock(status));
        assert!(outcome == Outcome::Note && text.contains(fix), "{text}");
    }
    assert_eq!(of(sandbox::seccomp(true)).0, Outcome::Ok);
    let (outcome, text) = of(sandbox::seccomp(false));
    assert!(outcome == Outcome::Note && text.contains("CONFIG_SECCOMP_FILTER=y"), "{text}");
    assert_eq!((of(sandbox::strict(true)).0, of(sandbox::strict(false)).0), (Outcome::Ok, Outcome::Note));
}

#[test]
fn asking_for_landlock_restricts_no_other_thread() {
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap();

    sandbox::check();

    assert!(std::fs::read(file.as_path()).is_ok());
}

#[test]
fn a_disk_that_the_host_uses_is_found_by_mount_swap_and_holder() {
    let (host, _directory) = host(&[
        ("proc/self/mounts", "/dev/nvme0n1p2 / ext4 rw 0 0\n/dev/nvme1n10 /data xfs rw 0 0\n"),
        ("proc/swaps", "Filename Type\n/dev/nvme2n1 partition 1 0 -2\n"),
        ("sys/class/block/nvme3n1/holders/dm-0/", ""),
        ("sys/class/block/nvme4n1/holders/", ""),
    ]);
    assert_eq!(function::user_of(&host, "nvme0n1").unwrap(), "/dev/nvme0n1 is mounted at /");
    assert_eq!(function::user_of(&host, "nvme2n1").unwrap(), "/dev/nvme2n1 is used for swap");
    assert_eq!(function::user_of(&host, "nvme3n1").unwrap(), "/dev/nvme3n1 is used by dm-0");
    assert_eq!(function::user_of(&host, "nvme4n1"), None);
    assert_eq!(function::user_of(&host, "nvme1n1"), None, "not nvme1n10");
}

#[test]
fn an_old_qemu_is_a_problem_and_one_without_vfio_user_is_noted() {
    assert_eq!(qemu::version("QEMU emulator version 10.1.0 (Debian)\n").outcome, Outcome::Ok);
    assert_eq!(qemu::version("QEMU emulator version 7.2.9 (Debian 1:7.2)\n").outcome, Outcome::Note);
    assert_eq!(qemu::version("QEMU emulator version 4.1.0\n").outcome, Outcome::Problem);
    assert_eq!(qemu::version("").outcome, Outcome::Note);
}

#[test]
fn a_running_qemu_must_share_all_its_memory() {
    let of = |arguments: &[&str]| qemu::shared("7", &arguments.join("\0")).map(|finding| finding.outcome);
    let disk = ["/usr/bin/qemu-system-x86_64", "-device", "vhost-user-blk-pci,chardev=c"];
    let with = |more: &[&str]| of(&[&disk[..], more].concat());
    assert_eq!(with(&["-m", "1G"]), Some(Outcome::Problem));
    assert_eq!(with(&["-object", "memory-backend-memfd,id=m,size=1G"]), Some(Outcome::Ok), "its default is to share");
    assert_eq!(with(&["-object", "memory-backend-memfd,id=m,size=1G,share=off"]), Some(Outcome::Problem));
    assert_eq!(with(&["-object", "memory-backend-file,id=m,mem-path=/dev/shm/m,share=on"]), Some(Outcome::Ok));
    assert_eq!(with(&["-object", "{\"qom-type\": \"memory-backend-file\", \"share\": true}"]), Some(Outcome::Ok));
    let two = ["-object", "memory-backend-memfd,id=m", "-object", "memory-backend-ram,id=n"];
    assert_eq!(with(&two), Some(Outcome::Problem), "a DIMM or a node that is not shared");
    assert_eq!(of(&["qemu-system-x86_64", "-m", "1G"]), None, "it has no such device");
    assert_eq!(of(&["less", "vhost-user.rst"]), None);
}

#[test]
fn one_problem_fails_the_report_and_notes_do_not() {
    let finding = |outcome| Finding { outcome, ..Finding::ok("kernel", "two\nlines") };
    let line = finding(Outcome::Problem).to_string();
    assert_eq!(line, "PROBLEM  kernel               two lines");
    let report = |checks: Vec<Finding>| {
        let passed = checks.iter().all(|finding| finding.outcome != Outcome::Problem);
        Diagnosis { schema: 1, passed, checks }.json()
    };
    let json = report(vec![finding(Outcome::Note)]);
    assert_eq!(
        json,
        r#"{"schema":1,"passed":true,"checks":[{"check":"kernel","outcome":"note","found":"two\nlines","fix":null}]}"#
    );
}
