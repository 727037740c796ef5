//! What the two sides say to each other: one request, one reply, both of fixed size, in a `SOCK_SEQPACKET` socket, so a
//! message arrives whole or not at all and there is no framing.
//!
//! ```text
//!  request, 32 bytes                 reply, 64 bytes
//!   0 magic    u32  "KVSH"            0 magic    u32              28 vms         u16
//!   4 version  u16                    4 version  u16              30 policy      u16  0 lock, 1 dynamic
//!   6 kind     u16  1 HELLO …         6 reason   u16  0: done     32 started_ms  u64
//!   8 serial   u32  comes back        8 serial   u32              40 registered  u16
//!  12 dma      u32  of REGISTER      12 errno    i32  0: done     42 told        u16
//!  16 handle   u64  of UNREGISTER    16 handle   u64  of REGISTER 44 kept        u16  0 or 1
//!  24 zero     u64                   24 vmm_pid  u32              46 zero        18 bytes
//! ```
//!
//! Numbers are little-endian. REGISTER for non-coherent DMA carries one descriptor (`SCM_RIGHTS`); no other message may.
//! The first six bytes keep their meaning in every version, so two versions can always tell each other what they are.

use std::fmt;

/// The version both sides must speak.
pub const VERSION: u16 = 1;
/// Bytes of a [`Request`].
pub const REQUEST_BYTES: usize = 32;
/// Bytes of a [`Reply`].
pub const REPLY_BYTES: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"KVSH");

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Comes first, and learns who is there.
    Hello,
    /// A device is about to reach guest memory.
    Register(Dma),
    /// It does no longer: the handle that REGISTER gave.
    Unregister(u64),
    /// How things stand.
    Query,
}

/// How a device's DMA treats the processors' caches, by the backend's own finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dma {
    /// It always snoops them. KVM need not know; guest memory must still not be discarded under the device.
    Coherent,
    /// It may go behind them, so KVM is told, by the device's file.
    NonCoherent,
}

/// The policy on changes of KVM's answer while the VM runs; see [`crate::lock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Once a vCPU has run, KVM's answer stays what it is.
    #[default]
    Lock,
    /// It follows the registrations at any time.
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
        /// Why a request was refused. With each goes an errno, which KVM's own refusals replace by theirs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
            /// A number this version does not know.
            Other(u16),
        }

        impl Reason {
            fn to_wire(self) -> u16 {
                match self { $(Self::$name => $number,)* Self::Other(number) => number }
            }
            fn from_wire(number: u16) -> Self {
                match number { $($number => Self::$name,)* other => Self::Other(other) }
            }
            /// The errno that goes with it.
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
    /// The message is not one of these, or carries a descriptor too many or too few. The connection ends.
    Malformed = 1, EPROTO;
    /// The other side speaks another version. The connection ends.
    Version = 2, EPROTONOSUPPORT;
    /// HELLO did not come first. The connection ends.
    HelloFirst = 3, EPROTO;
    /// The peer's user may not talk to this shim. The connection ends.
    Stranger = 4, EACCES;
    /// All connections or registrations are taken.
    TooMany = 5, EUSERS;
    /// The process has no VM, or KVM there has no VFIO support.
    NoVm = 6, ENODEV;
    /// The process has more than one VM: which one is meant cannot be told.
    SeveralVms = 7, ENOTUNIQ;
    /// A vCPU has run and the policy is `lock`.
    Locked = 8, EPERM;
    /// The descriptor is neither a VFIO device's nor a VFIO group's.
    NotVfio = 9, EINVAL;
    /// The descriptor is bound to an iommufd: whoever holds it holds the device and its pinned memory.
    Bound = 10, EBUSY;
    /// KVM refused the file; the errno is KVM's.
    Kvm = 11, EIO;
    /// No registration of this connection has that handle.
    NoSuchHandle = 12, ENOENT;
    /// A discard of guest memory that had begun before did not end.
    DiscardRuns = 13, ETIMEDOUT;
    /// Too many requests in too short a time. The connection ends.
    Flood = 14, EDQUOT;
}

/// From the backend to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Comes back in the reply.
    pub serial: u32,
    /// What is wanted.
    pub kind: Kind,
}

/// How things stand in the VMM; part of every reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Process id of the VMM, in its own namespace.
    pub vmm_pid: u32,
    /// Living VMs in the process; registrations with KVM need exactly one.
    pub vms: u16,
    /// What happens to KVM's answer while the VM runs.
    pub policy: Policy,
    /// When the first vCPU entered the guest, milliseconds since 1970; 0: none has.
    pub started_ms: u64,
    /// Registrations, coherent or not; while there is one, discards of guest RAM have no effect.
    pub registered: u16,
    /// Registrations whose file KVM holds.
    pub told: u16,
    /// True while KVM holds the file of a registration that has gone, so that its answer stays.
    pub kept: bool,
}

impl Status {
    /// True if KVM holds at least one file of a device whose DMA may go behind the caches. It then honours the guest's
    /// memory types and emulates WBINVD. (The VMM may have added files of its own, which are not counted.)
    #[must_use]
    pub fn non_coherent(&self) -> bool {
        self.told > 0 || self.kept
    }
}

/// From the VMM to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's.
    pub serial: u32,
    /// The new registration's handle, or why there is none.
    pub outcome: Result<u64, Refusal>,
    /// How things stand after the request.
    pub status: Status,
}

/// A request that was not done.
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

/// A message that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Garbled {
    /// Of another version of this protocol.
    Version(u16),
    /// Of no version.
    Malformed,
}

/// A message as it stands in the table above: fields in order, little-endian, without padding.
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

            fn from_bytes(bytes: &[u8]) -> Result<Self, Garbled> {
                header(bytes)?;
                let bytes: &[u8; $bytes] = bytes.try_into().map_err(|_| Garbled::Malformed)?;
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

/// Magic and version, the same in every version, so that a message of another one is told apart from noise.
fn header(bytes: &[u8]) -> Result<(), Garbled> {
    let (magic, rest) = bytes.split_first_chunk().ok_or(Garbled::Malformed)?;
    let version = rest.first_chunk().ok_or(Garbled::Malformed)?;
    match (u32::from_le_bytes(*magic), u16::from_le_bytes(*version)) {
        (MAGIC, VERSION) => Ok(()),
        (MAGIC, other) => Err(Garbled::Version(other)),
        _ => Err(Garbled::Malformed),
    }
}

impl Request {
    /// The message.
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

    /// Understands a message, or says what is wrong with it.
    ///
    /// # Errors
    /// Anything that [`Self::to_bytes`] would not write.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Garbled> {
        let raw = RawRequest::from_bytes(bytes)?;
        let kind = match (raw.kind, raw.dma, raw.handle) {
            (1, 0, 0) => Kind::Hello,
            (2, 0, 0) => Kind::Register(Dma::Coherent),
            (2, 1, 0) => Kind::Register(Dma::NonCoherent),
            (3, 0, handle) => Kind::Unregister(handle),
            (4, 0, 0) => Kind::Query,
            _ => return Err(Garbled::Malformed),
        };
        if raw.zero == 0 { Ok(Self { serial: raw.serial, kind }) } else { Err(Garbled::Malformed) }
    }
}

impl Reply {
    /// The message.
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

    /// Understands a message, or says what is wrong with it.
    ///
    /// # Errors
    /// Anything that [`Self::to_bytes`] would not write.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Garbled> {
        let raw = RawReply::from_bytes(bytes)?;
        let outcome = match (raw.reason, raw.errno, raw.handle) {
            (0, 0, handle) => Ok(handle),
            (reason @ 1.., errno @ 1.., 0) => Err(Refusal { reason: Reason::from_wire(reason), errno }),
            _ => return Err(Garbled::Malformed),
        };
        let (policy, kept) = match (raw.policy, raw.kept, raw.zero1, raw.zero2) {
            (0, kept @ (0 | 1), 0, 0) => (Policy::Lock, kept == 1),
            (1, kept @ (0 | 1), 0, 0) => (Policy::Dynamic, kept == 1),
            _ => return Err(Garbled::Malformed),
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
