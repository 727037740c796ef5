//! The protocol: one request, one reply, both of fixed size, over a `SOCK_SEQPACKET` socket. A message arrives complete or not
//! at all, so there is no framing.
//!
//! ```text
//!  request, 32 bytes                 reply, 64 bytes
//!   0 magic    u32  "KVSH"            0 magic    u32              28 vms         u16
//!   4 version  u16                    4 version  u16              30 policy      u16  0 lock, 1 dynamic
//!   6 kind     u16  1 HELLO …         6 reason   u16  0: done     32 started_ms  u64
//!   8 serial   u32                    8 serial   u32  of request  40 registered  u16
//!  12 dma      u32  of REGISTER      12 errno    i32  0: done     42 told        u16
//!  16 handle   u64  of UNREGISTER    16 handle   u64  of REGISTER 44 kept        u16  0 or 1
//!  24 zero     u64                   24 vmm_pid  u32              46 zero        18 bytes
//! ```
//!
//! Numbers are little-endian. REGISTER for non-coherent DMA carries one descriptor (`SCM_RIGHTS`); no other message carries
//! any. The first six bytes keep their meaning in every version, so each side can recognize another version.

use std::fmt;

/// The protocol's version, which must be the same on both sides.
pub const VERSION: u16 = 1;
/// Bytes of a [`Request`].
pub const REQUEST_BYTES: usize = 32;
/// Bytes of a [`Reply`].
pub const REPLY_BYTES: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"KVSH");

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first request of a connection; returns the status.
    Hello,
    /// Registers a device before it can access guest memory.
    Register(Dma),
    /// Ends a registration, by the handle that REGISTER returned.
    Unregister(u64),
    /// Returns the status.
    Query,
}

/// How a device's DMA treats the processors' caches, as the backend has found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// It always snoops them. KVM need not know, but guest memory must not be discarded while the device can access it.
    Coherent,
    /// It may bypass them, so the device's file is registered with KVM.
    NonCoherent,
}

/// Whether KVM's answer may change while the VM runs; see [`crate::lock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// KVM's answer does not change once a vCPU has run.
    #[default]
    Lock,
    /// KVM's answer always follows the registrations.
    Dynamic,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lock => "lock",
            Self::Dynamic => "dynamic",
        })
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $errno:ident;)*) => {
        /// Why a request was refused. Each reason has an errno; a refusal by KVM has KVM's errno instead.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
            /// A number unknown to this version.
            Other(u16),
        }

        impl Reason {
            fn to_wire(self) -> u16 {
                match self { $(Self::$name => $number,)* Self::Other(number) => number }
            }
            fn from_wire(number: u16) -> Self {
                match number { $($number => Self::$name,)* other => Self::Other(other) }
            }
            /// Its errno.
            #[must_use]
            pub fn errno(self) -> i32 {
                match self { $(Self::$name => libc::$errno,)* Self::Other(_) => libc::EPROTO }
            }
            #[cfg(test)]
            const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

reasons! {
    /// The message is not a request of this protocol, or has the wrong number of descriptors. The connection ends.
    Malformed = 1, EPROTO;
    /// The peer uses another version. The connection ends.
    Version = 2, EPROTONOSUPPORT;
    /// The first request was not HELLO. The connection ends.
    HelloFirst = 3, EPROTO;
    /// The peer's user may not use this shim. The connection ends.
    WrongUser = 4, EACCES;
    /// All connections or registrations are in use.
    LimitReached = 5, EUSERS;
    /// The process has no VM, or its kernel has no CONFIG_KVM_VFIO.
    NoVm = 6, ENODEV;
    /// The process has more than one VM.
    MultipleVms = 7, ENOTUNIQ;
    /// A vCPU has run and the policy is `lock`.
    Locked = 8, EPERM;
    /// The descriptor is neither a VFIO device nor a VFIO group.
    NotVfio = 9, EINVAL;
    /// The descriptor is bound to an iommufd: its holder would keep the device and its pinned memory.
    Bound = 10, EBUSY;
    /// KVM refused the file; the errno is KVM's.
    Kvm = 11, EIO;
    /// No registration of this connection has that handle.
    NoSuchHandle = 12, ENOENT;
    /// A discard of guest memory was in progress and did not end in time.
    DiscardPending = 13, ETIMEDOUT;
    /// Too many requests in too short a time. The connection ends.
    RateLimited = 14, EDQUOT;
}

/// A message from the backend to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Copied to the reply.
    pub serial: u32,
    /// What it does, with its argument.
    pub kind: Kind,
}

/// The shim's state; part of every reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Process id of the VMM, in its own namespace.
    pub vmm_pid: u32,
    /// VMs in the process; a registration with KVM needs exactly one.
    pub vms: u16,
    /// Whether KVM's answer may change while the VM runs.
    pub policy: Policy,
    /// When the first vCPU entered the guest, milliseconds since 1970; 0: none has.
    pub started_ms: u64,
    /// Registrations, coherent or not. If there is one, discards of guest RAM have no effect.
    pub registered: u16,
    /// Registrations whose file KVM holds.
    pub told: u16,
    /// True if KVM holds the file of a registration that has ended, so that its answer does not change.
    pub kept: bool,
}

impl Status {
    /// True if KVM holds at least one file of a device whose DMA may bypass the caches. It then honours the guest's memory
    /// types and emulates WBINVD. Files that the VMM has added for its own devices are not counted.
    #[must_use]
    pub fn non_coherent(&self) -> bool {
        self.told > 0 || self.kept
    }
}

/// A message from the VMM to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's serial number.
    pub serial: u32,
    /// The registration's handle (0 if there is none), or why the request was refused.
    pub outcome: Result<u64, Refusal>,
    /// The shim's state after the request.
    pub status: Status,
}

/// A refused request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// The errno; KVM's own for [`Reason::Kvm`].
    pub errno: i32,
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self { reason, errno: reason.errno() }
    }
}

/// A message that cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// It has another version of this protocol.
    Version(u16),
    /// It is not a message of this protocol.
    Malformed,
}

/// A message with the layout of the table above: fields in order, little-endian, without padding.
macro_rules! layout {
    ($name:ident, $bytes:ident: $($field:ident $type:ty),* $(,)?) => {
        struct $name { $($field: $type),* }

        const _: () = assert!(0 $(+ size_of::<$type>())* == $bytes, "the fields fill the message");

        impl $name {
            fn to_bytes(&self) -> [u8; $bytes] {
                let mut bytes = [0; $bytes];
                let mut at = 0;
                $(
                    let field = self.$field.to_le_bytes();
                    bytes[at..at + field.len()].copy_from_slice(&field);
                    at += field.len();
                )*
                debug_assert_eq!(at, $bytes);
                bytes
            }

            fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
                header(bytes)?;
                let bytes: &[u8; $bytes] = bytes.try_into().map_err(|_| DecodeError::Malformed)?;
                let mut rest = &bytes[..];
                $(
                    let (field, tail) = rest.split_first_chunk().expect("the fields fill the message");
                    let $field = <$type>::from_le_bytes(*field);
                    rest = tail;
                )*
                debug_assert!(rest.is_empty());
                Ok(Self { $($field),* })
            }
        }
    };
}

layout!(RawRequest, REQUEST_BYTES: magic u32, version u16, kind u16, serial u32, dma u32, handle u64, zero u64);

layout!(RawReply, REPLY_BYTES:
    magic u32, version u16, reason u16, serial u32, errno i32, handle u64,
    vmm_pid u32, vms u16, policy u16, started_ms u64, registered u16, told u16, kept u16, zero1 u16, zero2 u128,
);

/// Checks magic and version. They are the same in every version, so that another version can be recognized.
fn header(bytes: &[u8]) -> Result<(), DecodeError> {
    let (magic, rest) = bytes.split_first_chunk().ok_or(DecodeError::Malformed)?;
    let version = rest.first_chunk().ok_or(DecodeError::Malformed)?;
    match (u32::from_le_bytes(*magic), u16::from_le_bytes(*version)) {
        (MAGIC, VERSION) => Ok(()),
        (MAGIC, other) => Err(DecodeError::Version(other)),
        _ => Err(DecodeError::Malformed),
    }
}

impl Request {
    /// Encodes the message.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; REQUEST_BYTES] {
        let (kind, dma, handle) = match self.kind {
            Kind::Hello => (1, 0, 0),
            Kind::Register(Dma::Coherent) => (2, 0, 0),
            Kind::Register(Dma::NonCoherent) => (2, 1, 0),
            Kind::Unregister(handle) => (3, 0, handle),
            Kind::Query => (4, 0, 0),
        };
        RawRequest { magic: MAGIC, version: VERSION, kind, serial: self.serial, dma, handle, zero: 0 }.to_bytes()
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// Any bytes that [`Self::to_bytes`] would not produce.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let raw = RawRequest::from_bytes(bytes)?;
        let kind = match (raw.kind, raw.dma, raw.handle) {
            (1, 0, 0) => Kind::Hello,
            (2, 0, 0) => Kind::Register(Dma::Coherent),
            (2, 1, 0) => Kind::Register(Dma::NonCoherent),
            (3, 0, handle) => Kind::Unregister(handle),
            (4, 0, 0) => Kind::Query,
            _ => return Err(DecodeError::Malformed),
        };
        if raw.zero == 0 { Ok(Self { serial: raw.serial, kind }) } else { Err(DecodeError::Malformed) }
    }
}

impl Reply {
    /// Encodes the message.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; REPLY_BYTES] {
        let (reason, errno, handle) = match self.outcome {
            Ok(handle) => (0, 0, handle),
            Err(refusal) => (refusal.reason.to_wire(), refusal.errno, 0),
        };
        let status = &self.status;
        RawReply {
            magic: MAGIC,
            version: VERSION,
            reason,
            serial: self.serial,
            errno,
            handle,
            vmm_pid: status.vmm_pid,
            vms: status.vms,
            policy: u16::from(status.policy == Policy::Dynamic),
            started_ms: status.started_ms,
            registered: status.registered,
            told: status.told,
            kept: u16::from(status.kept),
            zero1: 0,
            zero2: 0,
        }
        .to_bytes()
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// Any bytes that [`Self::to_bytes`] would not produce.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let raw = RawReply::from_bytes(bytes)?;
        let outcome = match (raw.reason, raw.errno, raw.handle) {
            (0, 0, handle) => Ok(handle),
            (reason @ 1.., errno @ 1.., 0) => Err(Refusal { reason: Reason::from_wire(reason), errno }),
            _ => return Err(DecodeError::Malformed),
        };
        let (policy, kept) = match (raw.policy, raw.kept, raw.zero1, raw.zero2) {
            (0, kept @ (0 | 1), 0, 0) => (Policy::Lock, kept == 1),
            (1, kept @ (0 | 1), 0, 0) => (Policy::Dynamic, kept == 1),
            _ => return Err(DecodeError::Malformed),
        };
        let status = Status {
            vmm_pid: raw.vmm_pid,
            vms: raw.vms,
            policy,
            started_ms: raw.started_ms,
            registered: raw.registered,
            told: raw.told,
            kept,
        };
        Ok(Self { serial: raw.serial, outcome, status })
    }
}

#[cfg(test)]
mod tests;
