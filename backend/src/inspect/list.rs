//! All functions behind an IOMMU, with their verdicts.

use std::fmt;
use std::fs;

use crate::acquire::AcquiredFunction;
use crate::coherency::{Personality, Policy, decide};
use crate::iommu::Interface;
use crate::vfio::{InterfaceChoice, PciAddress};

/// One function behind an IOMMU. It displays as one line.
#[derive(Clone, Debug)]
pub struct ListEntry {
    pub(super) address: PciAddress,
    /// PCI class code as in sysfs: `0x010802`.
    pub(super) class: String,
    pub(super) driver: Option<String>,
    pub(super) group: String,
    /// Name of the IOMMU as in sysfs: `dmar0`.
    pub(super) iommu: Option<String>,
    /// The verdict in one word and the interface used, or why there is none; `None` if the function is not bound to vfio-pci.
    pub(super) verdict: Option<Result<(&'static str, Interface), String>>,
}

impl ListEntry {
    /// The verdict in one word, and the interface used.
    pub(super) fn verdict(&self) -> Option<(&'static str, Interface)> {
        self.verdict.as_ref()?.as_ref().ok().copied()
    }
}

/// Every function that has an IOMMU group, sorted by address. A function bound to vfio-pci is acquired for a moment.
#[must_use]
pub fn list() -> Vec<ListEntry> {
    let Ok(entries) = fs::read_dir("/sys/bus/pci/devices") else { return Vec::new() };
    let mut addresses: Vec<_> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    addresses.sort_by_key(PciAddress::to_string);
    addresses.into_iter().filter_map(entry).collect()
}

fn entry(address: PciAddress) -> Option<ListEntry> {
    let group = address.group()?;
    let class = fs::read_to_string(address.sysfs().join("class")).unwrap_or_default().trim().to_owned();
    let driver = address.driver();
    let iommu = fs::read_link(address.sysfs().join("iommu")).ok();
    let iommu = iommu.as_ref().and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
    let verdict = (driver.as_deref() == Some("vfio-pci")).then(|| verdict(address));
    Some(ListEntry { address, class, driver, group, iommu, verdict })
}

fn verdict(address: PciAddress) -> Result<(&'static str, Interface), String> {
    let acquired = AcquiredFunction::acquire(address, InterfaceChoice::Auto).map_err(|error| error.to_string())?;
    let evidence = acquired.evidence();
    let verdict = decide(&evidence.facts(Personality::Mediated, Policy::default(), false));
    Ok((verdict.word(), evidence.snoop.interface))
}

impl fmt::Display for ListEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, class, group, .. } = self;
        let (driver, iommu) = (self.driver.as_deref().unwrap_or("-"), self.iommu.as_deref().unwrap_or("-"));
        write!(f, "{address}  {class}  {driver:<12} group {group:<4} {iommu:<8} ")?;
        match &self.verdict {
            None => f.write_str("?"),
            Some(Ok((word, interface))) => write!(f, "{word} ({interface})"),
            Some(Err(error)) => write!(f, "? ({error})"),
        }
    }
}
