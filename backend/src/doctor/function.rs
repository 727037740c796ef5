//! What a function needs to be served.

use std::fs;

use super::finding::{Finding, Host, Outcome};
use crate::acquire::AcquiredFunction;
use crate::coherency::{Personality, Policy, Verdict, decide};
use crate::vfio::{InterfaceChoice, Opened, PciAddress, VfioError};

/// Class code of an NVMe I/O controller: mass storage, NVM, NVM Express (PCI Code and ID Assignment 1.13).
const NVME_CLASS: &str = "0x010802";

pub(super) fn check(host: &Host, address: PciAddress) -> Vec<Finding> {
    if !address.sysfs().exists() {
        let fix = "list shows the functions behind an IOMMU; lspci -D shows all";
        return vec![Finding::problem("function", format!("there is no function {address}"), fix)];
    }
    let mut findings = vec![class(address)];
    findings.extend(in_use_by_host(host, address));
    let binding = binding(address);
    let bound = binding.outcome == Outcome::Ok;
    findings.extend([binding, group(address)]);
    if bound && findings.iter().all(|finding| finding.outcome != Outcome::Problem) {
        findings.push(acquire(address));
    }
    findings
}

/// Without a function: which could be served.
pub(super) fn candidates() -> Finding {
    let entries = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    let addresses = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<PciAddress>().ok());
    let mut drives: Vec<_> = addresses
        .filter(|address| class_of(*address) == NVME_CLASS)
        .map(|address| format!("{address} ({})", address.driver().as_deref().unwrap_or("no driver")))
        .collect();
    drives.sort();
    if drives.is_empty() {
        return Finding::note("function", "this host has no NVMe drive", "--device emulated needs none");
    }
    Finding::note("function", format!("NVMe drives: {}", drives.join(", ")), "doctor ADDRESS looks at one")
}

fn class_of(address: PciAddress) -> String {
    fs::read_to_string(address.sysfs().join("class")).unwrap_or_default().trim().to_owned()
}

fn class(address: PciAddress) -> Finding {
    match class_of(address) {
        class if class == NVME_CLASS => Finding::ok("function", format!("{address} is an NVMe drive")),
        class => {
            let found = format!("{address} is no NVMe drive (class {class})");
            Finding::note("function", found, "it can only be served whole, with --vfio-user")
        }
    }
}

/// Block devices of the function that this host uses.
fn in_use_by_host(host: &Host, address: PciAddress) -> Option<Finding> {
    let directory = format!("sys/bus/pci/devices/{address}/nvme");
    let controllers = host.list(&directory);
    let disks = controllers.iter().flat_map(|controller| host.list(&format!("{directory}/{controller}")));
    // With multipath the disk is named for its subsystem, and the path to it has a c in its name: nvme0c0n1.
    let disks: Vec<_> = disks.filter(|name| name.starts_with("nvme") && name.contains('n')).collect();
    let used: Vec<_> = disks.iter().filter_map(|disk| user_of(host, disk)).collect();
    if used.is_empty() {
        return None;
    }
    let fix = "unmount it before it is bound to vfio-pci; its data are the guest's then";
    Some(Finding::problem("host-use", used.join(", "), fix))
}

/// Who uses a disk or a part of it: a mount, swap, or a device on top of it.
pub(super) fn user_of(host: &Host, disk: &str) -> Option<String> {
    let device = format!("/dev/{disk}");
    let uses = |line: &&str| {
        line.split_whitespace().next().is_some_and(|source| {
            let part = source.strip_prefix(&device);
            part.is_some_and(|part| part.is_empty() || part.starts_with('p'))
        })
    };
    let mounts = host.read("proc/self/mounts").unwrap_or_default();
    if let Some(mount) = mounts.lines().find(uses) {
        return Some(format!("{device} is mounted at {}", mount.split_whitespace().nth(1).unwrap_or("?")));
    }
    let swaps = host.read("proc/swaps").unwrap_or_default();
    if swaps.lines().any(|line| uses(&line)) {
        return Some(format!("{device} is used for swap"));
    }
    let holders = host.list(&format!("sys/class/block/{disk}/holders"));
    (!holders.is_empty()).then(|| format!("{device} is used by {}", holders.join(" and ")))
}

/// Its driver. The error has the command that binds it.
fn binding(address: PciAddress) -> Finding {
    match Opened::open(address) {
        Ok(_) | Err(VfioError::NoIommu(_)) => Finding::ok("binding", "bound to vfio-pci"),
        Err(error) => Finding::problem_of("binding", &error),
    }
}

fn group(address: PciAddress) -> Finding {
    let Some(group) = address.group() else {
        return Finding::problem("group", "it has no IOMMU group", "turn the IOMMU on, as above");
    };
    let siblings = address.host_owned_siblings();
    if siblings.is_empty() {
        return Finding::ok("group", format!("IOMMU group {group} has no other user"));
    }
    let found = format!("IOMMU group {group} is not viable: the host uses {}", siblings.join(", "));
    Finding::problem("group", found, "bind those to vfio-pci too, or put the device into another slot")
}

/// Opens, binds and attaches it for a moment. The errors say what to do.
fn acquire(address: PciAddress) -> Finding {
    match AcquiredFunction::acquire(address, InterfaceChoice::Auto) {
        Err(error) => Finding::problem_of("acquire", &error),
        Ok(acquired) => match decide(&acquired.evidence().facts(Personality::Mediated, Policy::default(), false)) {
            Verdict::Refuse(refusal) => Finding::problem_of("acquire", &refusal),
            verdict => Finding::ok("acquire", format!("{}; DMA is {verdict}", acquired.why())),
        },
    }
}
