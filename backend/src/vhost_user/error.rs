//! Everything that can go wrong between the socket and the rings. QEMU reports any of it as "Input/output error", so the
//! text here, in our log, is where a person learns what to change.

use std::io;

use crate::addr::{Bytes, Gpa, Qva, Span};
use crate::engine::{EngineError, Layout};
use crate::hardware::MapError;
use crate::kvm::RegistrationError;
use crate::memory::RegionError;

/// What QEMU needs on its command line for its memory to be ours too.
const SHARE: &str =
    "start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem";

/// Why a message was refused, or a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control loop itself failed.
    #[error("{what}: {source}")]
    System {
        /// The step that failed.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The message announces more bytes than any message has.
    #[error("request {request} announces {size} bytes, at most {MAX_MESSAGE} are accepted")]
    Oversized {
        /// Its name.
        request: String,
        /// Announced bytes.
        size: u32,
    },
    /// Descriptors came where none belong, or too many.
    #[error("request {request}: {what}")]
    Descriptors {
        /// Its name.
        request: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The codec could not make sense of a message.
    #[error("request {request}: {what}")]
    Malformed {
        /// Its name.
        request: String,
        /// What is wrong.
        what: String,
    },
    /// The front-end sends and sends, but does not read what it is answered.
    #[error("the front-end does not read its replies")]
    NotReading,
    /// So many messages were refused that there is no point in going on.
    #[error("{0} messages refused; giving up on this front-end")]
    TooManyRefusals(u32),
    /// A feature was acknowledged that had not been offered.
    #[error("{what} acknowledges {names}, which was not offered")]
    NotOffered {
        /// The request.
        what: &'static str,
        /// The features.
        names: String,
    },
    /// The guest's addresses were to be translated by a virtual IOMMU.
    #[error(
        "SET_FEATURES acknowledges ACCESS_PLATFORM, which was not offered: addresses are taken as guest-physical, a virtual IOMMU is not served; leave out iommu_platform=on and ats=on"
    )]
    AccessPlatform,
    /// A request for something that is not offered.
    #[error("{0} belongs to a feature that is not offered")]
    NotImplemented(&'static str),
    /// The guest wrote to configuration space.
    #[error("SET_CONFIG: no field of this disk's configuration space can be written")]
    ReadOnlyConfig,
    /// There is no such queue.
    #[error("virtqueue {index} does not exist, there are {queues}; give the device num-queues={queues} or fewer")]
    NoSuchRing {
        /// Asked for.
        index: u32,
        /// Offered.
        queues: u16,
    },
    /// A queue size that no ring of its layout can have, or that is larger than what is served.
    #[error("virtqueue {index}: the size of a {layout} ring is {}, not {size}; change queue-size", layout.sizes())]
    RingSize {
        /// The queue.
        index: usize,
        /// Asked for.
        size: u32,
        /// Split or packed.
        layout: Layout,
    },
    /// An index that does not fit a split ring.
    #[error("virtqueue {index}: first index {base} does not fit the 16 bits of a split ring")]
    RingBase {
        /// The queue.
        index: usize,
        /// Asked for.
        base: u32,
    },
    /// A ring part at an address that the specification rules out.
    #[error("virtqueue {index}: {part} at {address} is not aligned to {alignment} bytes (virtio 1.2 §2.7, §2.8)")]
    RingAlignment {
        /// The queue.
        index: usize,
        /// Which of the three parts.
        part: &'static str,
        /// Where.
        address: Qva,
        /// What it must be a multiple of.
        alignment: u64,
    },
    /// A dirty log was asked for.
    #[error("virtqueue {0}: logging of the used ring was asked for, which is not offered")]
    RingLog(usize),
    /// The ring was changed while it runs.
    #[error("virtqueue {index}: {what} while the ring runs; GET_VRING_BASE stops it first")]
    RingRuns {
        /// The queue.
        index: usize,
        /// The request.
        what: &'static str,
    },
    /// A ring was enabled before features were agreed on.
    #[error("virtqueue {index} cannot start: SET_FEATURES has not been sent since the device was reset")]
    NotNegotiated {
        /// The queue.
        index: usize,
    },
    /// No memory has been shared at all.
    #[error("virtqueue {index} cannot start: the front-end has shared no memory; {SHARE}")]
    NoMemory {
        /// The queue.
        index: usize,
    },
    /// A ring outside what has been shared.
    #[error(
        "virtqueue {index} cannot start: its {part} at {address} ({} bytes) lies in no shared region (shared: {regions}); all guest RAM must be shared, also each NUMA node and DIMM; {SHARE}",
        len
    )]
    RingOutside {
        /// The queue.
        index: usize,
        /// Which of the three parts.
        part: &'static str,
        /// Where.
        address: Qva,
        /// Its size, bytes.
        len: u64,
        /// What is shared.
        regions: String,
    },
    /// A region that the front-end itself sees as a private copy.
    #[error(
        "memory region {gpa}: the front-end has mapped this memory privately, so it would never see what the device writes; {SHARE}"
    )]
    PrivateMemory {
        /// Where.
        gpa: Span<Gpa>,
    },
    /// An empty or wrapping region.
    #[error("memory region at {start:#x} of {len} bytes: empty, or past the end of the address space")]
    RegionRange {
        /// Guest address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// A region was to be removed that is not there.
    #[error("REM_MEM_REG {gpa} (user address {qva}): no such region (regions: {regions})")]
    UnknownRegion {
        /// Where.
        gpa: Span<Gpa>,
        /// Where in the front-end.
        qva: Qva,
        /// What is there.
        regions: String,
    },
    /// More regions than were promised.
    #[error("{0} memory regions, at most {MAX_SLOTS} are served")]
    TooManyRegions(usize),
    /// The region itself is at fault.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The address space refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The VM's process could not be told of the device.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The data path refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A change of memory failed and could not be undone either.
    #[error("{failed}; undoing it failed too: {undo}; the guest has lost {}", Bytes(*lost))]
    NotUndone {
        /// What went wrong first.
        failed: Box<Error>,
        /// What went wrong then.
        undo: MapError,
        /// Bytes of guest memory that are no longer mapped.
        lost: u64,
    },
}

/// Largest payload, bytes; the codec's own limit.
pub(super) const MAX_MESSAGE: u32 = 4096;

/// How many memory regions can be added one by one. QEMU on x86 uses up to 512, KVM allows 509 for its guests.
pub(super) const MAX_SLOTS: usize = 509;

impl Error {
    /// For `map_err` on a system call of the control loop.
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System { what, source: error.into() }
    }

    /// True if there is no way to go on with this front-end.
    pub(super) fn ends_conversation(&self) -> bool {
        matches!(self, Self::NotUndone { .. } | Self::TooManyRefusals(_))
    }
}
