//! Errors of the vhost-user back-end. QEMU reports each of them as "Input/output error", so the text logged here must tell
//! the user what to change.

use std::io;

use super::dirty_log::LogError;
use crate::addr::{Bytes, Gpa, Qva, Span};
use crate::engine::{EngineError, Layout};
use crate::foreign_fd::{NotAnEventfd, UnusableFds};
use crate::handover::DescriptorError;
use crate::hardware::MapError;
use crate::kvm::RegistrationError;
use crate::memory::{FileId, RegionError, SharedFileError};

/// QEMU's options for guest memory that is shared with this process.
const SHARE: &str =
    "start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem";

/// QEMU's device that gives a guest all features, and the end of the zones in the configuration space.
const ZONED_DEVICE: &str = "use QEMU's -device vhost-user-test-device-pci,virtio-id=2,config_size=96,num_vqs=QUEUES and a guest \
                            with Linux 6.4 or newer (CONFIG_BLK_DEV_ZONED)";
const ZONED_END: &str = "bytes 72 to 95";

/// Why a message was refused or a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call of the control thread failed.
    #[error("{step}: {source}")]
    System {
        /// The system call, or its purpose.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The payload is larger than any message's.
    #[error("request {request} announces {size} bytes, at most {MAX_MESSAGE} are accepted")]
    Oversized {
        /// The name of the request.
        request: String,
        /// Announced size of the payload, bytes.
        size: u32,
    },
    /// A message has the wrong number or kind of file descriptors.
    #[error("request {request}: {problem}")]
    Descriptors {
        /// The name of the request.
        request: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The file descriptors of a message cannot be used.
    #[error("request {request}: {unusable}")]
    UnusableDescriptors {
        /// The name of the request.
        request: String,
        /// Why.
        unusable: UnusableFds,
    },
    /// A kick, call or error descriptor is not an eventfd.
    #[error("{request}: {source}")]
    NotAnEventfd {
        /// The name of the request.
        request: &'static str,
        /// What it is.
        source: NotAnEventfd,
    },
    /// A message is malformed, or belongs to a feature that has not been negotiated.
    #[error("request {request}: {problem}")]
    Malformed {
        /// The name of the request.
        request: String,
        /// What is wrong.
        problem: String,
    },
    /// The socket's send buffer is full because the front-end does not read its replies.
    #[error("the front-end does not read its replies")]
    NotReading,
    /// The front-end has exceeded the limit of refused messages.
    #[error("{0} messages refused; giving up on this front-end")]
    TooManyRefusals(u32),
    /// An acknowledged feature was not offered.
    #[error("{request} acknowledges {names}, which was not offered")]
    NotOffered {
        /// The name of the request.
        request: &'static str,
        /// The names of the features.
        names: String,
    },
    /// A virtual IOMMU was requested.
    #[error(
        "SET_FEATURES acknowledges ACCESS_PLATFORM, which was not offered: addresses must be guest-physical, a virtual IOMMU is not supported; leave out iommu_platform=on and ats=on"
    )]
    AccessPlatform,
    /// The request belongs to a feature that is not offered.
    #[error("{0} belongs to a feature that is not offered")]
    NotImplemented(&'static str),
    /// SET_CONFIG of anything but `writeback`, or with a value other than 0 or 1.
    #[error("SET_CONFIG: only writeback can be written, with 0 or 1")]
    ReadOnlyConfig,
    /// The message would affect the guest of the front-end that is served.
    #[error("{request} from a front-end that waits while another one is served")]
    NotServedYet {
        /// The name of the request.
        request: &'static str,
    },
    /// There is no such virtqueue.
    #[error("virtqueue {index} does not exist, there are {queues}; give the device num-queues={queues} or fewer")]
    NoSuchRing {
        /// Index in the message.
        index: u32,
        /// Number of virtqueues offered.
        queues: u16,
    },
    /// The queue size is not allowed for the layout.
    #[error("virtqueue {index}: the size of a {layout} ring is {}, not {size}; change queue-size", layout.sizes())]
    RingSize {
        /// Index of the virtqueue.
        index: usize,
        /// Requested size, entries.
        size: u32,
        /// Split or packed.
        layout: Layout,
    },
    /// The base does not fit a split ring.
    #[error("virtqueue {index}: first index {base} does not fit the 16 bits of a split ring")]
    RingBase {
        /// Index of the virtqueue.
        index: usize,
        /// Requested base.
        base: u32,
    },
    /// A part of the ring is misaligned.
    #[error("virtqueue {index}: {part} at {address} is not aligned to {alignment} bytes (virtio 1.2 §2.7, §2.8)")]
    RingAlignment {
        /// Index of the virtqueue.
        index: usize,
        /// Name of the part.
        part: &'static str,
        /// Address of the part.
        address: Qva,
        /// Required alignment, bytes.
        alignment: u64,
    },
    /// Dirty pages cannot be marked as requested.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The request is not allowed while the ring runs.
    #[error("virtqueue {index}: {request} while the ring runs; GET_VRING_BASE stops it first")]
    RingRuns {
        /// Index of the virtqueue.
        index: usize,
        /// The name of the request.
        request: &'static str,
    },
    /// A protocol feature was acknowledged without one that it needs.
    #[error("SET_PROTOCOL_FEATURES: {feature} may be acknowledged only together with {needed}")]
    FeatureAlone {
        /// Its name.
        feature: String,
        /// The name of the one that is missing.
        needed: String,
    },
    /// A ring was enabled before features were negotiated.
    #[error("virtqueue {index} cannot start: SET_FEATURES has not been sent since the device was reset")]
    NotNegotiated {
        /// Index of the virtqueue.
        index: usize,
    },
    /// The front-end has shared no memory.
    #[error("virtqueue {index} cannot start: the front-end has shared no memory; {SHARE}")]
    NoMemory {
        /// Index of the virtqueue.
        index: usize,
    },
    /// A part of the ring is outside shared memory.
    #[error(
        "virtqueue {index} cannot start: its {part} at {address} ({len} bytes) is in no shared region (shared: {regions}); all guest RAM must be shared, also each NUMA node and DIMM; {SHARE}"
    )]
    RingOutside {
        /// Index of the virtqueue.
        index: usize,
        /// Name of the part.
        part: &'static str,
        /// Address of the part.
        address: Qva,
        /// Size of the part, bytes.
        len: u64,
        /// The shared regions.
        regions: String,
    },
    /// The front-end maps the region with `MAP_PRIVATE`.
    #[error(
        "memory region {gpa}: the front-end has mapped this memory privately, so it would never see what the device writes; {SHARE}"
    )]
    PrivateMemory {
        /// Guest-physical range of the region.
        gpa: Span<Gpa>,
    },
    /// The region is empty or wraps.
    #[error("memory region at {start:#x} of {len} bytes: empty, or past the end of the address space")]
    RegionRange {
        /// Guest-physical address.
        start: u64,
        /// Size, bytes.
        len: u64,
    },
    /// The region to be removed does not exist.
    #[error("REM_MEM_REG {gpa} (user address {qva}): no such region (regions: {regions})")]
    UnknownRegion {
        /// Guest-physical range in the message.
        gpa: Span<Gpa>,
        /// Front-end address in the message.
        qva: Qva,
        /// The existing regions.
        regions: String,
    },
    /// There would be more regions than GET_MAX_MEM_SLOTS reports.
    #[error("{0} memory regions, at most {MAX_SLOTS} are supported")]
    TooManyRegions(usize),
    /// GET_INFLIGHT_FD or SET_INFLIGHT_FD for virtqueues that do not exist.
    #[error("{request}: {found} virtqueues, there are {queues}; give the device num-queues={queues} or fewer")]
    InflightQueues {
        /// The name of the request.
        request: &'static str,
        /// Number in the message.
        found: u16,
        /// Number of virtqueues offered.
        queues: u16,
    },
    /// GET_INFLIGHT_FD or SET_INFLIGHT_FD with a size that no ring can have.
    #[error("{request}: the size of a {layout} ring is {}, not {size}; change queue-size", layout.sizes())]
    InflightSize {
        /// The name of the request.
        request: &'static str,
        /// Size in the message, descriptors.
        size: u16,
        /// Split or packed.
        layout: Layout,
    },
    /// The region of SET_INFLIGHT_FD is too small for its virtqueues.
    #[error("SET_INFLIGHT_FD: {queues} virtqueues of {entries} descriptors need {needed} bytes, mmap_size is {found}")]
    InflightBytes {
        /// Number of virtqueues.
        queues: u16,
        /// Descriptors of each.
        entries: u16,
        /// Bytes they need.
        needed: u64,
        /// Bytes in the message.
        found: u64,
    },
    /// The file of SET_INFLIGHT_FD cannot be used.
    #[error("SET_INFLIGHT_FD: {0}")]
    InflightFile(#[from] SharedFileError),
    /// The front-end or its guest does not know zones.
    #[error(
        "the drive is zoned, and this front-end or its guest does not acknowledge VIRTIO_BLK_F_ZONED: as an ordinary disk it would fail most writes; {ZONED_DEVICE}"
    )]
    ZonesUnknown,
    /// The front-end reads a configuration space that ends before the zones, as QEMU's vhost-user-blk does.
    #[error(
        "the drive is zoned, and this front-end gives its guest {found} bytes of configuration space, in which the zones at {ZONED_END} are missing; {ZONED_DEVICE}"
    )]
    ZonesUnread {
        /// Bytes that it reads.
        found: usize,
    },
    /// The region is invalid, or cannot be mapped in this process.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The region cannot be mapped for, or unmapped from, the device.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The description of a session that was handed over names a descriptor that did not come.
    #[error(transparent)]
    HandedOver(#[from] DescriptorError),
    /// It has a region in a memory file that it does not have.
    #[error("the description has no memory file {0}")]
    NoSuchFile(usize),
    /// The file of a region is another one.
    #[error("memory region {gpa}: handed over with file {found}, but it was in inode {inode}")]
    OtherFile {
        /// Guest-physical range of the region.
        gpa: Span<Gpa>,
        /// The file that came.
        found: FileId,
        /// The file that it was.
        inode: u64,
    },
    /// It has another number of virtqueues.
    #[error("the description has {found} virtqueues, this process {queues}")]
    RingCount {
        /// In the description.
        found: usize,
        /// Offered here.
        queues: u16,
    },
    /// The device is not registered with KVM.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The engine has failed or refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A change of memory failed and could not be undone.
    #[error("{failed}; undoing it failed too: {undo}; the guest has lost {}", Bytes(*lost))]
    NotUndone {
        /// Why the change failed.
        failed: Box<Error>,
        /// Why undoing it failed.
        undo: MapError,
        /// Size of the guest memory that is no longer mapped, bytes.
        lost: u64,
    },
}

/// Largest payload, bytes; the codec's limit.
pub(super) const MAX_MESSAGE: u32 = 4096;

/// Memory regions of a front-end, as GET_MAX_MEM_SLOTS reports. QEMU on x86 uses up to 512, KVM allows 509 for its guests.
pub(super) const MAX_SLOTS: usize = 509;

impl Error {
    /// For `map_err` on a system call of the control thread.
    pub(super) fn system<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System { step, source: error.into() }
    }

    /// True if the front-end would rely on marks that it does not get, unless it is told.
    pub(super) fn concerns_log(&self) -> bool {
        matches!(self, Self::Log(_))
    }

    /// True if the connection cannot continue after this error.
    pub(super) fn ends_connection(&self) -> bool {
        matches!(self, Self::NotUndone { .. } | Self::TooManyRefusals(_))
    }
}
