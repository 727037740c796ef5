//! Asks the virtual machine's QEMU to unplug a device of type `vfio-user-pci`, over a monitor of its own (QMP). QEMU asks the
//! guest in turn, which ejects the device when it is ready.
//!
//! QEMU does not tell which socket such a device uses: the property `socket` cannot be read (`hw/vfio-user/pci.c`). So the
//! monitor must be that of the process that uses the function, and the device must be its only one of this type, or be named.
//!
//! A device with MSI-X is not unplugged. QEMU 10.1 to 11.1.3 abort then (`vfio_user_msix_teardown` removes the region of the
//! pending bits from a BAR that has lost it already), and no version is known that does not.

mod connection;
mod error;

use std::path::PathBuf;
use std::time::Instant;

use rustix::net::SocketAddrUnix;
use serde::Deserialize;
use serde_json::json;

use crate::socket::Peer;

use connection::{Connection, shown};
pub use error::QmpError;

/// The type of QEMU's device for a vfio-user server.
const DEVICE_TYPE: &str = "vfio-user-pci";
/// Where QEMU keeps its devices: those with an ID, by their IDs, and those without.
const CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// Children of a device with MSI-X (`msix_init`): `msix-table[0]` and `msix-pba[0]`.
const MSIX_CHILD: &str = "msix-";

/// A QMP monitor of the virtual machine's QEMU.
#[derive(Clone, Debug)]
pub struct Monitor {
    path: PathBuf,
    device: Option<String>,
}

/// An entry of the answer to `qom-list` (QEMU: `qapi/qom.json`, `ObjectPropertyInfo`).
#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Monitor {
    /// The monitor that listens at `path`. `device` names the function there, by its ID or QOM path; `None` if it is the only
    /// device of its type.
    ///
    /// # Errors
    /// The path cannot be that of a socket.
    pub fn new(path: PathBuf, device: Option<String>) -> Result<Self, QmpError> {
        match SocketAddrUnix::new(&path) {
            Ok(_) => Ok(Self { path, device }),
            Err(errno) => Err(QmpError::Path(path, errno)),
        }
    }

    /// Asks QEMU to unplug the device, and returns the device's QOM path. Whether and when the guest ejects it is not awaited.
    /// `front_end` is the process that uses the function, if it is known.
    ///
    /// Blocks, at most until `deadline` once the socket's path has been looked up.
    ///
    /// # Errors
    /// Why QEMU was not asked, or has refused.
    pub fn unplug(&self, front_end: Option<u32>, deadline: Instant) -> Result<String, QmpError> {
        let mut connection = Connection::open(&self.path, deadline)?;
        self.check_process(&connection, front_end)?;
        connection.negotiate()?;
        let device = self.find(&mut connection)?;
        let has_msix = |child: &Property| child.kind.starts_with("child<") && child.name.starts_with(MSIX_CHILD);
        if list(&mut connection, &device)?.iter().any(has_msix) {
            return Err(QmpError::Msix(shown(&device)));
        }
        connection.execute("device_del", &json!({ "id": device }))?;
        Ok(shown(&device))
    }

    /// Refuses the monitor of another process than the one that uses the function.
    fn check_process(&self, connection: &Connection, front_end: Option<u32>) -> Result<(), QmpError> {
        let peer = Peer::of(connection.socket()).map_err(|error| QmpError::System("getsockopt(SO_PEERCRED)", error))?;
        match (peer.pid(), front_end) {
            (Some(pid), Some(front_end)) if pid != front_end => {
                Err(QmpError::OtherProcess { path: self.path.clone(), found: peer.to_string(), front_end })
            }
            _ => Ok(()),
        }
    }

    /// Finds the function's device, and returns its QOM path.
    fn find(&self, connection: &mut Connection) -> Result<String, QmpError> {
        let mut devices = Vec::new();
        for container in CONTAINERS {
            let children = list(connection, container)?.into_iter();
            let of_type = children.filter(|child| child.kind == format!("child<{DEVICE_TYPE}>"));
            devices.extend(of_type.map(|child| format!("{container}/{}", child.name)));
        }
        if let Some(device) = &self.device {
            let paths = [device.clone(), format!("{}/{device}", CONTAINERS[0])];
            let named = devices.into_iter().find(|found| paths.contains(found));
            return named.ok_or_else(|| QmpError::NoDevice(format!("with the ID or QOM path `{}`", shown(device))));
        }
        match devices.as_slice() {
            [] => Err(QmpError::NoDevice("at all".into())),
            [device] => Ok(device.clone()),
            several => Err(QmpError::Several(shown(&several.join(", ")))),
        }
    }
}

/// The properties of the object at `path`, its children among them.
fn list(connection: &mut Connection, path: &str) -> Result<Vec<Property>, QmpError> {
    let answer = connection.execute("qom-list", &json!({ "path": path }))?;
    serde_json::from_value(answer).map_err(|error| QmpError::Garbage("list of properties", shown(&error.to_string())))
}

#[cfg(test)]
mod tests;
