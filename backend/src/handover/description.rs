//! The description of a session: small, readable, versioned. Descriptors are numbers here; see [`super::Incoming`]. It comes from
//! another process, so whoever restores from it checks each value like one of a front-end's message.

use super::descriptors::FdKey;
use serde::{Deserialize, Serialize};

use crate::acquire::hand_over::FunctionDescription;
use crate::driver::DiskState;
use crate::socket::SocketFileState;

/// Version of the description and of the messages. Both processes must have the same.
pub(super) const VERSION: u32 = 1;

/// A descriptor that moves with the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdNumber(pub u32);

/// Everything that the next owner of the session needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// [`Self::VERSION`].
    pub version: u32,
    /// When requests began to wait, in ns of CLOCK_MONOTONIC.
    pub paused_at: u64,
    /// The device.
    pub device: DeviceState,
    /// The socket at which front-ends connect; `None` if the front-end came with an inherited, connected socket.
    pub listener: Option<ListenerState>,
    /// The socket at which successors connect.
    pub successors: Option<ListenerState>,
    /// What the service manager keeps of the session: the file, unless it is the text, and its number. See
    /// [`crate::service_manager`].
    pub stored: Vec<(Option<FdKey>, u32)>,
    /// The front-end that is connected.
    pub front_end: Option<FrontEnd>,
}

impl Description {
    /// The version that this program writes and reads.
    pub const VERSION: u32 = VERSION;
}

/// The device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// What must be found again.
    pub disk: DiskState,
    /// Size of the disk, logical blocks. It may have changed meanwhile.
    pub blocks: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The write cache is on.
    pub write_cache: bool,
    /// Where the function comes from.
    pub function: FunctionState,
}

/// What moves of the function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum FunctionState {
    /// An emulated drive: the open file behind it, which is locked.
    Emulated {
        /// `None` if it stores nothing.
        medium: Option<FdNumber>,
    },
    /// A VFIO function with its address space, in which guest memory stays pinned.
    Vfio {
        /// The function.
        function: Box<FunctionDescription>,
        /// Its file, bound and attached.
        device: FdNumber,
        /// The iommufd.
        iommufd: FdNumber,
    },
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerState {
    /// The socket.
    pub socket: FdNumber,
    /// Its name, for the log.
    pub name: String,
    /// The file to be removed at the end; `None` if another program created it.
    pub file: Option<SocketFileState>,
}

/// The session of the front-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontEnd {
    /// Its connection. No message has been read and not answered.
    pub connection: FdNumber,
    /// It has asked for the features.
    pub asked_features: bool,
    /// The last SET_FEATURES.
    pub acked_features: Option<u64>,
    /// They are in force: no reset came after them.
    pub negotiated: bool,
    /// The last SET_PROTOCOL_FEATURES.
    pub protocol_features: u64,
    /// The virtio status.
    pub status: u64,
    /// Messages that were refused.
    pub refusals: u32,
    /// The back-end's channel.
    pub channel: Option<FdNumber>,
    /// The files of guest memory, each once.
    pub files: Vec<FdNumber>,
    /// Guest memory.
    pub regions: Vec<RegionState>,
    /// Where requests in flight are recorded. None are: the rings were drained, unless the process before crashed.
    pub inflight: Option<InflightState>,
    /// Where dirty pages are marked, if the front-end has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<LogState>,
    /// Who is told of marks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_event: Option<FdNumber>,
    /// The virtqueues, from 0 on.
    pub rings: Vec<RingState>,
    /// The registration with the VM's shim, which lasts as long as this socket.
    pub shim: Option<ShimState>,
}

/// A region of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionState {
    /// Guest-physical address.
    pub gpa: u64,
    /// Size as announced, bytes.
    pub size: u64,
    /// Address in the front-end.
    pub user: u64,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Index in [`FrontEnd::files`].
    pub file: usize,
    /// Inode of the file.
    pub inode: u64,
}

/// SET_INFLIGHT_FD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InflightState {
    /// The file.
    pub file: FdNumber,
    /// Size of all regions, bytes.
    pub size: u64,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Virtqueues that have a region.
    pub queues: u16,
    /// Descriptors of each.
    pub entries: u16,
}

/// SET_LOG_BASE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogState {
    /// The file.
    pub file: FdNumber,
    /// Size, bytes.
    pub size: u64,
    /// Offset in the file, bytes.
    pub offset: u64,
}

/// A virtqueue. It does not run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    /// Number of descriptors.
    pub size: Option<u32>,
    /// Descriptor table, available ring, used ring, as in SET_VRING_ADDR.
    pub addresses: Option<[u64; 3]>,
    /// What the used ring is logged as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_log: Option<u64>,
    /// Where to go on, as in SET_VRING_BASE.
    pub base: Option<u32>,
    /// How the driver signals requests; `None` if it has not said so, and then the ring does not start.
    pub kick: Option<Kick>,
    /// The driver's interrupt.
    pub call: Option<FdNumber>,
    /// For errors.
    pub err: Option<FdNumber>,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
}

/// SET_VRING_KICK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kick {
    /// An eventfd.
    Event(FdNumber),
    /// Without one, the ring is polled.
    Polled,
}

/// The registration with the shim in the VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShimState {
    /// The connection.
    pub socket: FdNumber,
    /// Number of the last request on it.
    pub serial: u32,
    /// The registration.
    pub handle: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_is_not_known_is_refused() {
        let text =
            r#"{"size":null,"addresses":null,"base":null,"kick":null,"call":null,"err":null,"enabled":true,"x":1}"#;
        assert!(serde_json::from_str::<RingState>(text).unwrap_err().to_string().contains("unknown field `x`"));
    }
}
