//! `cdi`: a description of functions for container runtimes, by the specification of the Container Device Interface (CDI),
//! version 0.5.0. Older versions allow no name that starts with a digit. The runtime gives a container that asks for
//! `vhost-device-vfio/function=0000:00:04.0` the device nodes that serving the function needs, and lets its control group open
//! them.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::vfio::{InterfaceChoice, Opened, PciAddress, VfioError};

/// The oldest version of the specification that knows all that is used here.
const CDI_VERSION: &str = "0.5.0";
/// Vendor and class, which are the first part of a device's name.
const KIND: &str = "vhost-device-vfio/function";

/// A CDI file ("CDI JSON Specification").
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: ContainerEdits,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerEdits {
    device_nodes: Vec<DeviceNode>,
}

/// The same path in the container, because this program finds it by the name in sysfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct DeviceNode {
    path: PathBuf,
    permissions: &'static str,
}

impl Description {
    /// Describes functions that are bound to vfio-pci. Reads sysfs, and opens no device.
    ///
    /// # Errors
    /// The first function that cannot be served through the interface, and how to fix it.
    pub fn new(functions: &[PciAddress], choice: InterfaceChoice) -> Result<Self, VfioError> {
        let described = functions.iter().map(|function| Ok((*function, nodes(*function, choice)?)));
        Ok(Self::of(described.collect::<Result<Vec<_>, VfioError>>()?))
    }

    fn of(functions: Vec<(PciAddress, [PathBuf; 2])>) -> Self {
        let node = |path| DeviceNode { path, permissions: "rw" };
        let device = |(function, paths): (PciAddress, [PathBuf; 2])| Device {
            name: function.to_string(),
            container_edits: ContainerEdits { device_nodes: paths.map(node).into() },
        };
        Self { cdi_version: CDI_VERSION, kind: KIND, devices: functions.into_iter().map(device).collect() }
    }

    /// The file's contents.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("text and lists can always be written as JSON")
    }
}

/// The two device nodes by which `function` is used.
fn nodes(function: PciAddress, choice: InterfaceChoice) -> Result<[PathBuf; 2], VfioError> {
    Opened::open(function)?;
    let iommufd = || Some([Path::new("/dev/iommu").to_owned(), function.cdev()?]);
    let type1 = || Some([Path::new("/dev/vfio/vfio").to_owned(), function.group_file()?]);
    match choice {
        InterfaceChoice::Iommufd => iommufd().ok_or(VfioError::NoCdev(function)),
        InterfaceChoice::Type1 => type1().ok_or(VfioError::NoIommu(function)),
        InterfaceChoice::Auto => {
            let preferred = iommufd().filter(|_| Path::new("/dev/iommu").exists());
            preferred.or_else(type1).ok_or(VfioError::NoIommu(function))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_described_by_its_two_device_nodes() {
        let paths = ["/dev/iommu", "/dev/vfio/devices/vfio3"].map(PathBuf::from);

        let json = Description::of(vec![("0000:00:04.0".parse().unwrap(), paths)]).json();

        let found: serde_json::Value = serde_json::from_str(&json).unwrap();
        let node = |path| serde_json::json!({ "path": path, "permissions": "rw" });
        let nodes = [node("/dev/iommu"), node("/dev/vfio/devices/vfio3")];
        let wanted = serde_json::json!({
            "cdiVersion": "0.5.0",
            "kind": "vhost-device-vfio/function",
            "devices": [{ "name": "0000:00:04.0", "containerEdits": { "deviceNodes": nodes } }],
        });
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_function_that_this_machine_does_not_have_is_not_described() {
        let error = Description::new(&["ffff:1f:1f.7".parse().unwrap()], InterfaceChoice::Auto).unwrap_err();
        assert!(matches!(error, VfioError::NoSuchFunction(_)), "{error}");
    }
}
