//! What the host must have for any function.

use std::fs::File;
use std::io;
use std::path::Path;

use super::finding::{Finding, Host};
use crate::addr::Bytes;
use crate::sys::Container;
use crate::vfio::{VfioError, open_iommufd};

/// The first Linux with character devices and iommufd for VFIO.
const IOMMUFD_SINCE: (u32, u32) = (6, 6);
/// The oldest Linux that the tests run on.
const OLDEST: (u32, u32) = (6, 1);
/// What the driver needs for itself: about 2 MiB for each queue pair.
const DRIVER_KIB: u64 = 8 << 10;
/// CAP_IPC_LOCK (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

pub(super) fn check(host: &Host) -> Vec<Finding> {
    vec![
        kernel(host),
        iommu(host),
        interrupt_remapping(host),
        interface(),
        vfio_pci(host),
        locked_memory(host),
        huge_pages(host),
    ]
}

pub(super) fn kernel(host: &Host) -> Finding {
    let release = host.read("proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Finding::note("kernel", format!("release {release:?}"), "Linux 6.1 or newer is needed");
    };
    let found = format!("Linux {release}");
    match (major, minor) {
        version if version >= IOMMUFD_SINCE => Finding::ok("kernel", found),
        version if version >= OLDEST => {
            Finding::note("kernel", found, "it has no iommufd for VFIO, so type1 is used; Linux 6.6 or newer has it")
        }
        _ => Finding::problem("kernel", found, "install Linux 6.1 or newer"),
    }
}

pub(super) fn iommu(host: &Host) -> Finding {
    let (groups, units) = (host.list("sys/kernel/iommu_groups").len(), host.list("sys/class/iommu"));
    if groups != 0 {
        return Finding::ok("iommu", format!("{groups} groups behind {}", units.join(", ")));
    }
    let cpu = host.read("proc/cpuinfo").unwrap_or_default();
    let fix = if cpu.contains("GenuineIntel") {
        "turn VT-d on in the firmware, and boot with intel_iommu=on"
    } else if cpu.contains("AuthenticAMD") {
        "turn AMD-Vi (IOMMU) on in the firmware, and boot without amd_iommu=off"
    } else {
        "turn the IOMMU (SMMU) on in the firmware; a virtual machine needs an emulated one"
    };
    Finding::problem("iommu", "it is off, or this machine has none: there are no IOMMU groups", fix)
}

/// The kernel names the chips of remapped interrupts with the prefix IR- (x86).
pub(super) fn interrupt_remapping(host: &Host) -> Finding {
    const CHECK: &str = "interrupt-remapping";
    let Some(interrupts) = host.read("proc/interrupts") else {
        return Finding::note(
            CHECK,
            "/proc/interrupts cannot be read",
            "without remapping the function cannot be bound",
        );
    };
    let names = |prefix: &str| interrupts.split_whitespace().any(|word| word.starts_with(prefix));
    if names("IR-") {
        return Finding::ok(CHECK, "interrupts are remapped");
    }
    if !names("IO-APIC") && !names("PCI-MSI") {
        return Finding::ok(CHECK, "not a matter of this architecture");
    }
    let unsafe_allowed = ["iommufd", "vfio_iommu_type1"].into_iter().find(|module| {
        let parameter = host.read(&format!("sys/module/{module}/parameters/allow_unsafe_interrupts"));
        parameter.is_some_and(|value| value.trim() == "Y")
    });
    match unsafe_allowed {
        Some(module) => Finding::note(
            CHECK,
            format!("off, and {module}.allow_unsafe_interrupts allows that"),
            "a guest with a whole function can then inject interrupts into the host",
        ),
        None => Finding::problem(
            CHECK,
            "off: interrupts of devices are not isolated",
            "turn it on in the firmware, and boot without intremap=off; if every guest is trusted, boot with \
             iommufd.allow_unsafe_interrupts=1 or vfio_iommu_type1.allow_unsafe_interrupts=1",
        ),
    }
}

fn interface() -> Finding {
    let iommufd = match open_iommufd(Path::new("/dev/iommu")) {
        Ok(_) => return Finding::ok("interface", "/dev/iommu can be opened"),
        Err(error) => error,
    };
    match open_container() {
        Ok(_) => {
            Finding::note("interface", "/dev/vfio/vfio can be opened", format!("type1 is used, because {iommufd}"))
        }
        Err(source) => {
            let type1 = VfioError::no_container(source);
            Finding::problem_of("interface", &format!("{iommufd}; nor can VFIO type1 be used: {type1}"))
        }
    }
}

fn open_container() -> io::Result<Container> {
    Container::new(File::options().read(true).write(true).open("/dev/vfio/vfio")?.into())
}

pub(super) fn vfio_pci(host: &Host) -> Finding {
    if host.path("sys/bus/pci/drivers/vfio-pci").exists() {
        Finding::ok("vfio-pci", "the driver is loaded")
    } else {
        Finding::problem(
            "vfio-pci",
            "the driver is not loaded",
            "modprobe vfio-pci; name it in /etc/modules-load.d for the next boot",
        )
    }
}

pub(super) fn locked_memory(host: &Host) -> Finding {
    const CHECK: &str = "locked-memory";
    const FIX: &str = "ulimit -l unlimited; LimitMEMLOCK=infinity; --ulimit memlock=-1:-1; or grant CAP_IPC_LOCK";
    let limits = host.read("proc/self/limits").unwrap_or_default();
    let status = host.read("proc/self/status").unwrap_or_default();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or_default();
    if capabilities >> CAP_IPC_LOCK & 1 == 1 {
        return Finding::ok(CHECK, "unlimited, by CAP_IPC_LOCK");
    }
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max locked memory")?.split_whitespace().next());
    match soft.map(|soft| soft.parse::<u64>()) {
        None => Finding::note(CHECK, "/proc/self/limits cannot be read", FIX),
        Some(Err(_)) => Finding::ok(CHECK, "unlimited"),
        Some(Ok(bytes)) if bytes / 1024 < DRIVER_KIB => {
            Finding::problem(CHECK, format!("at most {}; all memory of the guest is locked", Bytes(bytes)), FIX)
        }
        Some(Ok(bytes)) => {
            let found = format!("at most {}; the guest's memory and some MiB more must fit", Bytes(bytes));
            Finding::note(CHECK, found, FIX)
        }
    }
}

pub(super) fn huge_pages(host: &Host) -> Finding {
    let count = |name: &str, file: &str| {
        host.read(&format!("sys/kernel/mm/hugepages/{name}/{file}")).and_then(|text| text.trim().parse::<u64>().ok())
    };
    let sizes = host.list("sys/kernel/mm/hugepages");
    let free: Vec<_> = sizes
        .iter()
        .filter_map(|name| Some((name, count(name, "free_hugepages").filter(|&free| free != 0)?)))
        .map(|(name, free)| format!("{free} of {}", name.trim_start_matches("hugepages-")))
        .collect();
    if free.is_empty() {
        let fix = "optional: sysctl vm.nr_hugepages=N and hugetlb=on make mapping the guest's memory faster";
        return Finding::note("huge-pages", "none is free", fix);
    }
    Finding::ok("huge-pages", format!("free: {}", free.join(", ")))
}
