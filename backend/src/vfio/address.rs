//! The address of a PCI function, and what sysfs says about it. Read-only: nothing here opens the device.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `domain:bus:device.function`, such as `0000:00:04.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// The text is not a PCI address.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a PCI address; expected DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, such as 0000:00:04.0")]
pub struct NotAnAddress(String);

impl FromStr for PciAddress {
    type Err = NotAnAddress;

    /// Accepts an address with or without the domain, as `lspci` prints it.
    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        parse(text).ok_or_else(|| NotAnAddress(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (slot, function) = text.rsplit_once('.')?;
    let mut parts = slot.rsplit(':');
    let device = hex(parts.next()?, 0x1f)?;
    let bus = hex(parts.next()?, 0xff)?;
    let domain = parts.next().map_or(Some(0), |part| hex(part, u32::MAX))?;
    if parts.next().is_some() {
        return None;
    }
    let function = hex(function, 7)?;
    Some(PciAddress {
        domain,
        bus: u8::try_from(bus).ok()?,
        device: u8::try_from(device).ok()?,
        function: u8::try_from(function).ok()?,
    })
}

/// Hexadecimal digits without sign or prefix, up to `max`.
fn hex(text: &str, max: u32) -> Option<u32> {
    let digits_only = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    u32::from_str_radix(text, 16).ok().filter(|value| digits_only && *value <= max)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl PciAddress {
    /// The function's directory in sysfs.
    #[must_use]
    pub fn sysfs(&self) -> PathBuf {
        Path::new("/sys/bus/pci/devices").join(self.to_string())
    }

    /// The driver it is bound to, if any.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        link_name(&self.sysfs().join("driver"))
    }

    /// Its IOMMU group; `None` without an IOMMU.
    #[must_use]
    pub fn group(&self) -> Option<String> {
        link_name(&self.sysfs().join("iommu_group"))
    }

    /// True for an SR-IOV virtual function.
    #[must_use]
    pub fn is_virtual_function(&self) -> bool {
        self.sysfs().join("physfn").exists()
    }

    /// What sysfs says about its IOMMU, as text: Intel VT-d's snoop control (VT-d 4.1 §11.4.3, ECAP.SC), else its name.
    #[must_use]
    pub fn iommu_hardware(&self) -> String {
        let iommu = self.sysfs().join("iommu");
        let ecap = fs::read_to_string(iommu.join("intel-iommu/ecap")).ok();
        match (ecap.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()), link_name(&iommu)) {
            (Some(ecap), _) => format!("Intel VT-d, ECAP.SC={}", ecap >> 7 & 1),
            (None, Some(name)) => format!("IOMMU {name}"),
            (None, None) => "IOMMU hardware unknown".to_owned(),
        }
    }

    /// Its VFIO character device, if the kernel has one for it. A kernel without character devices has the directory in sysfs, too,
    /// but no device number in it.
    #[must_use]
    pub fn cdev(&self) -> Option<PathBuf> {
        let mut entries = fs::read_dir(self.sysfs().join("vfio-dev")).ok()?;
        let entry = entries.next()?.ok()?;
        entry.path().join("dev").exists().then(|| Path::new("/dev/vfio/devices").join(entry.file_name()))
    }

    /// The file of its IOMMU group, if it has a group. The kernel may have no such file.
    #[must_use]
    pub fn group_file(&self) -> Option<PathBuf> {
        Some(Path::new("/dev/vfio").join(self.group()?))
    }

    /// The other functions of its IOMMU group that are bound to a host driver, as `ADDRESS (DRIVER)`. Bridges are left out: they
    /// do no DMA of their own.
    #[must_use]
    pub fn host_owned_siblings(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.sysfs().join("iommu_group/devices")) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| *name != self.to_string()).filter_map(|name| host_owned(&name)).collect()
    }
}

fn host_owned(name: &str) -> Option<String> {
    let driver = link_name(&Path::new("/sys/bus/pci/devices").join(name).join("driver"))?;
    // These drivers do no DMA on behalf of the host, so the kernel counts the group as viable.
    let allowed = matches!(driver.as_str(), "vfio-pci" | "pcieport" | "pci-stub");
    (!allowed).then(|| format!("{name} ({driver})"))
}

fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_parses_with_and_without_its_domain() {
        let full: PciAddress = "0000:00:04.0".parse().unwrap();
        assert_eq!("00:04.0".parse::<PciAddress>().unwrap(), full);
        assert_eq!("10000:FF:1f.7".parse::<PciAddress>().unwrap().to_string(), "10000:ff:1f.7");
        assert_eq!(full.to_string(), "0000:00:04.0");
    }

    #[test]
    fn a_bad_address_is_refused_with_an_example() {
        for text in ["", "nvme0", "00:04", "00:20.0", "00:04.8", "0:0:0:4.0", "00:+4.0", "../00:04.0", "00:04.0 "] {
            let error = text.parse::<PciAddress>().unwrap_err().to_string();
            assert!(error.contains("such as 0000:00:04.0"), "{text}: {error}");
        }
    }
}
