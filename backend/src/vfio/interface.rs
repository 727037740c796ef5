//! The choice between the kernel's two interfaces: iommufd with character devices, or containers with groups.

use std::fmt;
use std::path::Path;

use super::{Opened, VfioError, open_iommufd};
use crate::sys::{Container, Iommufd};

/// `--iommu`: the interface to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InterfaceChoice {
    /// iommufd if it can be used, else type1.
    #[default]
    Auto,
    /// iommufd (Linux 6.6 or newer).
    Iommufd,
    /// VFIO's IOMMU type 1.
    Type1,
}

/// The interface that was found, open.
pub enum FoundInterface {
    /// `/dev/iommu`.
    Iommufd(Iommufd),
    /// `/dev/vfio/vfio`. With the error because of which it is not iommufd, unless the choice was [`InterfaceChoice::Type1`].
    Type1(Container, Option<VfioError>),
}

impl Opened {
    /// Opens the interface that is to be used for the function. Nothing is bound yet.
    ///
    /// # Errors
    /// Why it cannot be used. With [`InterfaceChoice::Auto`], why neither can.
    pub fn find_interface(&self, choice: InterfaceChoice) -> Result<FoundInterface, VfioError> {
        let iommufd = || self.check_cdev().and_then(|()| open_iommufd(Path::new("/dev/iommu")));
        match choice {
            InterfaceChoice::Iommufd => iommufd().map(FoundInterface::Iommufd),
            InterfaceChoice::Type1 => Ok(FoundInterface::Type1(self.open_container()?, None)),
            InterfaceChoice::Auto => match iommufd() {
                Ok(iommufd) => Ok(FoundInterface::Iommufd(iommufd)),
                Err(reason) => match self.open_container() {
                    Ok(container) => Ok(FoundInterface::Type1(container, Some(reason))),
                    Err(type1) => Err(VfioError::NoInterface { iommufd: Box::new(reason), type1: Box::new(type1) }),
                },
            },
        }
    }
}

/// The interface, and why it is used.
impl fmt::Display for FoundInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iommufd(_) => f.write_str("through iommufd, which is preferred to VFIO type1"),
            Self::Type1(_, None) => f.write_str("through VFIO type1, as --iommu=type1 says"),
            Self::Type1(_, Some(reason)) => write!(f, "through VFIO type1, because iommufd cannot be used: {reason}"),
        }
    }
}
