//! The options that are a choice of words, and what they mean to the library.

use clap::ValueEnum;

use crate::coherency::Policy;
use crate::driver::nvme::{Avoid, InterruptPolicy};
use crate::hardware::InterruptKind;
use crate::passthrough::BarAccess;
use crate::vfio::InterfaceChoice;
use crate::vhost_user::VirtioFeatures;

/// `--bars`: how the guest accesses the registers of a whole function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Bars {
    /// Mapped into the guest: the VMM gets a descriptor of the device
    #[default]
    Direct,
    /// By messages: the VMM gets no descriptor
    Trapped,
}

impl From<Bars> for BarAccess {
    fn from(bars: Bars) -> Self {
        match bars {
            Bars::Direct => Self::Direct,
            Bars::Trapped => Self::Trapped,
        }
    }
}

/// `--iommu`: the kernel's interface for the device and its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Iommu {
    /// iommufd if it can be used, else VFIO type1
    #[default]
    Auto,
    /// iommufd and character devices (Linux 6.6 or newer, if it was built with them)
    Iommufd,
    /// VFIO's groups and containers
    Type1,
}

impl From<Iommu> for InterfaceChoice {
    fn from(iommu: Iommu) -> Self {
        match iommu {
            Iommu::Auto => Self::Auto,
            Iommu::Iommufd => Self::Iommufd,
            Iommu::Type1 => Self::Type1,
        }
    }
}

/// `--sandbox`: what the process gives up once it serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SandboxChoice {
    /// All that it does not need, as far as the kernel can take it away
    #[default]
    Auto,
    /// The same; the process does not start if the kernel lacks a part
    Strict,
    /// Nothing
    Off,
}

/// `--interrupts`: how the drive tells of finished commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Interrupts {
    /// By the best that it has: MSI-X, MSI, INTx
    #[default]
    Auto,
    /// By MSI-X
    Msix,
    /// By MSI
    Msi,
    /// By INTx
    Intx,
    /// Not at all
    Poll,
}

impl From<Interrupts> for InterruptPolicy {
    fn from(interrupts: Interrupts) -> Self {
        match interrupts {
            Interrupts::Auto => Self::Auto,
            Interrupts::Msix => Self::Only(InterruptKind::MsiX),
            Interrupts::Msi => Self::Only(InterruptKind::Msi),
            Interrupts::Intx => Self::Only(InterruptKind::Intx),
            Interrupts::Poll => Self::Poll,
        }
    }
}

/// `--rings`: the layouts of virtqueues that are offered (virtio 1.2 §2.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Rings {
    /// Split and packed; the front-end chooses
    #[default]
    Any,
    /// Split only, for a front-end that starts packed rings wrongly
    Split,
}

impl Rings {
    /// The features that are not offered.
    #[must_use]
    pub fn withheld(self) -> VirtioFeatures {
        match self {
            Self::Any => VirtioFeatures::empty(),
            Self::Split => VirtioFeatures::RING_PACKED,
        }
    }
}

/// `--avoid`: what a drive does badly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Avoided {
    /// Write Zeroes
    WriteZeroes,
    /// Discard
    Discard,
    /// Scatter-gather lists
    Sgl,
    /// More than one interrupt vector
    Vectors,
    /// Command identifiers that two queues use, or that are above the size of a queue
    Tags,
}

impl From<Avoided> for Avoid {
    fn from(what: Avoided) -> Self {
        match what {
            Avoided::WriteZeroes => Self::WriteZeroes,
            Avoided::Discard => Self::Discard,
            Avoided::Sgl => Self::Sgl,
            Avoided::Vectors => Self::Vectors,
            Avoided::Tags => Self::Tags,
        }
    }
}

/// `--no-snoop`: what to do about a device that can bypass the CPU caches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NoSnoopPolicy {
    /// Keep its Enable No Snoop bit clear if possible, else flush
    #[default]
    Suppress,
    /// Leave the bit as it is, and flush
    Allow,
    /// Serve only a device whose DMA is coherent
    Refuse,
    /// Assume that the device bypasses the caches, whatever its bit says, and flush
    Assume,
}

impl From<NoSnoopPolicy> for Policy {
    fn from(policy: NoSnoopPolicy) -> Self {
        match policy {
            NoSnoopPolicy::Suppress => Self::Suppress,
            NoSnoopPolicy::Allow => Self::Allow,
            NoSnoopPolicy::Refuse => Self::Refuse,
            NoSnoopPolicy::Assume => Self::Assume,
        }
    }
}
