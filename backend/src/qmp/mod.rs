//! Asks the virtual machine's QEMU to unplug a device of type `vfio-user-pci`, over a monitor of its own (QMP). QEMU asks the
//! guest in turn, which ejects the device when it is ready.
//!
//! The property `socket` of such a device cannot be read (`hw/vfio-user/pci.c`), but its regions are named after the socket
//! (`vfio-user:PATH BAR 0`). The device is the one whose regions have the path that this program listens on. QEMU may have been
//! given another name of the same socket; then it is the only device of this type. The administrator can name it, too.
//!
//! A device with MSI-X is not unplugged. QEMU 10.1 to 11.1.3 abort then (`vfio_user_msix_teardown` removes the region of the
//! pending bits from a BAR that has lost it already), and no version is known that does not.

mod connection;
mod error;

use std::path::{Path, PathBuf};
use std::time::Instant;

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

/// Who uses the function, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct FrontEnd {
    /// Its process.
    pub process: Option<u32>,
    /// The socket that it has connected to.
    pub socket: Option<PathBuf>,
}

/// A device of the type in question.
struct Device {
    path: String,
    children: Vec<Property>,
}

impl Device {
    fn has_msix(&self) -> bool {
        self.children.iter().any(|child| child.name.starts_with(MSIX_CHILD))
    }

    /// True if a region is named after `socket`.
    fn uses(&self, socket: &Path) -> bool {
        let prefix = format!("vfio-user:{} ", escaped(&socket.to_string_lossy()));
        self.children.iter().any(|child| child.name.starts_with(&prefix))
    }
}

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
    /// The monitor that listens at `path`. `device` names the function there, by its ID or QOM path.
    #[must_use]
    pub fn new(path: PathBuf, device: Option<String>) -> Self {
        Self { path, device }
    }

    /// Asks QEMU to unplug the device that `front_end` uses, and returns the device's QOM path. Whether and when the guest ejects
    /// it is not awaited.
    ///
    /// Blocks, at most until `deadline` once the monitor's path has been looked up.
    ///
    /// # Errors
    /// Why QEMU was not asked, or has refused.
    pub fn unplug(&self, front_end: &FrontEnd, deadline: Instant) -> Result<String, QmpError> {
        let mut connection = Connection::open(&self.path, deadline)?;
        self.check_process(&connection, front_end.process)?;
        connection.negotiate()?;
        let device = self.select(devices(&mut connection)?, front_end.socket.as_deref())?;
        if device.has_msix() {
            return Err(QmpError::Msix(shown(&device.path)));
        }
        connection.execute("device_del", &json!({ "id": device.path }))?;
        Ok(shown(&device.path))
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

    /// Selects the function's device among `devices`.
    fn select(&self, mut devices: Vec<Device>, socket: Option<&Path>) -> Result<Device, QmpError> {
        if let Some(name) = &self.device {
            let paths = [name.clone(), format!("{}/{name}", CONTAINERS[0])];
            let named = devices.into_iter().find(|found| paths.contains(&found.path));
            return named.ok_or_else(|| QmpError::NoDevice(format!("with the ID or QOM path `{}`", shown(name))));
        }
        if let Some(socket) = socket
            && devices.iter().any(|device| device.uses(socket))
        {
            devices.retain(|device| device.uses(socket));
        }
        match devices.len() {
            0 => Err(QmpError::NoDevice("at all".into())),
            1 => Ok(devices.remove(0)),
            _ => {
                let paths: Vec<_> = devices.into_iter().map(|device| device.path).collect();
                Err(QmpError::Several(shown(&paths.join(", "))))
            }
        }
    }
}

/// All devices of the type in question.
fn devices(connection: &mut Connection) -> Result<Vec<Device>, QmpError> {
    let mut devices = Vec::new();
    for container in CONTAINERS {
        for child in list(connection, container)? {
            if child.kind == format!("child<{DEVICE_TYPE}>") {
                let path = format!("{container}/{}", child.name);
                let mut children = list(connection, &path)?;
                children.retain(|child| child.kind.starts_with("child<"));
                devices.push(Device { path, children });
            }
        }
    }
    Ok(devices)
}

/// `name` as it is in the name of a memory region (QEMU: `memory_region_escape_name`).
fn escaped(name: &str) -> String {
    let escape = |char| match char {
        '/' | '[' | '\\' | ']' => format!("\\x{:02x}", u32::from(char)),
        char => char.to_string(),
    };
    name.chars().map(escape).collect()
}

/// The properties of the object at `path`, its children among them.
fn list(connection: &mut Connection, path: &str) -> Result<Vec<Property>, QmpError> {
    let answer = connection.execute("qom-list", &json!({ "path": path }))?;
    serde_json::from_value(answer).map_err(|error| QmpError::Garbage("list of properties", shown(&error.to_string())))
}

#[cfg(test)]
mod tests;
