//! Decodes and checks the Identify data of the controller and its namespaces.
//!
//! The data comes from an untrusted device, so every field is range-checked. Each `decode` is a pure function from Identify
//! data to checked values or an error.

use std::time::Duration;

use super::error::NvmeErrorKind;
use super::options::Avoid;
use super::prp::MAX_TRANSFER;
use super::sgl::Granularity;
use super::spec::{IdentifyController, IdentifyNamespace, IdentifyNvmController, MAX_RANGES, NAMESPACE_NOTICES};
use super::zones::Zones;
use crate::driver::{DiscardLimits, ZeroesLimits};

/// The longest transfer that this driver uses with a controller without a limit, bytes.
const UNLIMITED_TRANSFER: u32 = 1 << 20;
/// Most metadata bytes per block that are served; formats with more are not known.
const MOST_METADATA: u16 = 128;
/// Lower and upper bound of the shutdown time-out, whatever RTD3E says. Writing back a large cache takes seconds; a drive
/// that takes more than a minute will not finish.
const SHUTDOWN_TIMEOUTS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// The properties of the controller that this driver uses.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) serial: String,
    pub(super) model: String,
    pub(super) firmware: String,
    /// Longest transfer, bytes.
    pub(super) max_transfer: u32,
    /// VWC bit 0: a volatile write cache is present. It may be disabled.
    pub(super) write_cache: bool,
    /// Time-out of a normal shutdown.
    pub(super) shutdown_limit: Duration,
    /// NN: the highest valid namespace identifier.
    pub(super) namespaces: u32,
    /// AWUPF, logical blocks (1's based).
    atomic_blocks: u32,
    /// SGLS: granularity of SGLs; `None` if not supported.
    pub(super) sgl: Option<Granularity>,
    /// OAES bit 8: the controller reports namespace changes.
    pub(super) namespace_notices: bool,
    /// CMIC bit 3: the controller reports the state of the path to each namespace.
    pub(super) path_states: bool,
    /// ONCS bit 2: Dataset Management.
    dataset_management: bool,
    /// ONCS bit 3: Write Zeroes.
    write_zeroes: bool,
}

impl Identity {
    /// Checks Identify Controller data. NVMe 2.0 §5.17.2.1
    pub(super) fn decode(data: &IdentifyController) -> Result<Self, NvmeErrorKind> {
        // CNTRLTYPE: 0 not reported, 1 I/O, 2 discovery, 3 administrative.
        if data.cntrltype > 1 {
            let name = match data.cntrltype {
                2 => "a discovery controller",
                3 => "an administrative controller",
                _ => "no I/O controller",
            };
            let found = format!("{} ({name})", data.cntrltype);
            return Err(NvmeErrorKind::Unsuitable { property: "controller type", found, wanted: "1" });
        }
        entry_size("submission queue entry sizes (SQES)", data.sqes, 6, "6 (64 bytes) in the range")?;
        entry_size("completion queue entry sizes (CQES)", data.cqes, 4, "4 (16 bytes) in the range")?;
        let (least, most) = SHUTDOWN_TIMEOUTS;
        Ok(Self {
            serial: printable(&data.sn),
            model: printable(&data.mn),
            firmware: printable(&data.fr),
            max_transfer: max_transfer(data.mdts),
            write_cache: data.vwc & 1 == 1,
            shutdown_limit: Duration::from_micros(data.rtd3e.into()).clamp(least, most),
            namespaces: data.nn,
            atomic_blocks: u32::from(data.awupf) + 1,
            sgl: Granularity::decode(data.sgls),
            namespace_notices: data.oaes & NAMESPACE_NOTICES != 0,
            path_states: data.cmic & 1 << 3 != 0,
            dataset_management: data.oncs & 1 << 2 != 0,
            write_zeroes: data.oncs & 1 << 3 != 0,
        })
    }
}

impl Identity {
    /// Leaves out what the operator wants to avoid.
    pub(super) fn avoid(&mut self, avoid: &[Avoid]) {
        self.write_zeroes &= !avoid.contains(&Avoid::WriteZeroes);
        self.dataset_management &= !avoid.contains(&Avoid::Discard);
        if avoid.contains(&Avoid::Sgl) {
            self.sgl = None;
        }
    }
}

/// The limits of discard and write-zeroes on a namespace. `limits` are the controller's, if it reports them.
pub(super) fn range_limits(
    identity: &Identity,
    namespace: &Namespace,
    limits: Option<&IdentifyNvmController>,
) -> (Option<DiscardLimits>, Option<ZeroesLimits>) {
    (
        identity.dataset_management.then(|| discard_limits(limits)),
        identity.write_zeroes.then(|| zeroes_limits(identity, namespace, limits)),
    )
}

/// In `limits`, zero means no limit.
fn discard_limits(limits: Option<&IdentifyNvmController>) -> DiscardLimits {
    let (dmrl, dmrsl, dmsl) = limits.map_or((0, 0, 0), |limits| (limits.dmrl, limits.dmrsl, limits.dmsl));
    let blocks = if dmsl == 0 { u64::MAX } else { dmsl };
    let range_blocks = if dmrsl == 0 { u32::MAX } else { dmrsl };
    DiscardLimits {
        ranges: if dmrl == 0 { MAX_RANGES } else { dmrl.into() },
        range_blocks: u32::try_from(blocks).map_or(range_blocks, |blocks| blocks.min(range_blocks)),
        blocks,
    }
}

/// Without WZSL, apply MDTS. By the specification MDTS does not limit Write Zeroes (NVM Command Set 1.0 §3.2.8), but some
/// controllers apply it, and Linux does the same.
fn zeroes_limits(identity: &Identity, namespace: &Namespace, limits: Option<&IdentifyNvmController>) -> ZeroesLimits {
    let bytes = match limits.map_or(0, |limits| limits.wzsl) {
        0 => u64::from(identity.max_transfer),
        // A power of two of the smallest page, which is 4 KiB here.
        shift => 4096 << shift.min(32),
    };
    let blocks = (bytes / u64::from(namespace.block_size)).min(1 << 16);
    ZeroesLimits { blocks: u32::try_from(blocks).expect("at most 65536"), deallocates: namespace.zeroes_deallocate }
}

/// SQES and CQES: the smallest size in bits 3:0, the largest in bits 7:4, as powers of two.
fn entry_size(property: &'static str, sizes: u8, shift: u8, wanted: &'static str) -> Result<(), NvmeErrorKind> {
    if (sizes & 0xf..=sizes >> 4).contains(&shift) {
        return Ok(());
    }
    Err(NvmeErrorKind::Unsuitable { property, found: format!("{} to {}", sizes & 0xf, sizes >> 4), wanted })
}

/// MDTS is a power of two of the smallest page, which is 4 KiB here (`Controller::open` accepts no other).
fn max_transfer(mdts: u8) -> u32 {
    match mdts {
        0 => UNLIMITED_TRANSFER,
        1..=8 => 4096 << mdts,
        _ => MAX_TRANSFER,
    }
}

/// Converts a text field of the device to printable ASCII without padding, safe for terminals and guests.
pub(super) fn printable(text: &[u8]) -> String {
    let clean = |&byte: &u8| if byte == b' ' || byte.is_ascii_graphic() { char::from(byte) } else { '?' };
    let unpadded = text.trim_ascii_end();
    let end = unpadded.iter().rposition(|&byte| byte != 0 && byte != b' ').map_or(0, |last| last + 1);
    unpadded[..end].trim_ascii_start().iter().map(clean).collect()
}

/// A namespace that this driver supports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) id: u32,
    /// NGUID and EUI64, each zero if the namespace has none. Globally unique otherwise, unlike `id`.
    pub(super) identifiers: ([u8; 16], [u8; 8]),
    /// NSZE, logical blocks.
    pub(super) blocks: u64,
    /// Bytes of a logical block.
    pub(super) block_size: u32,
    /// Metadata of a block, in a buffer of their own and without protection information, bytes.
    pub(super) metadata: u16,
    /// Preferred write granularity, bytes.
    pub(super) physical_block_size: u32,
    /// NABO in bytes, if it is less than a physical block.
    pub(super) alignment_offset: u32,
    /// NOWS: optimal write size, bytes; 0 if not reported.
    pub(super) optimal_size: u32,
    /// NOIOB: a transfer should not cross a multiple of this many blocks; 0: none.
    pub(super) boundary: u32,
    /// NSATTR bit 0.
    pub(super) write_protected: bool,
    /// The zones, if the namespace has them.
    pub(super) zones: Option<Zones>,
    /// DLFEAT: Write Zeroes can deallocate (bit 3) and deallocated blocks read as zeroes (bits 2:0 = 001b).
    pub(super) zeroes_deallocate: bool,
}

impl Namespace {
    /// Checks Identify Namespace data; `None` if the namespace is inactive. NVM Command Set 1.0 §4.1.5.1
    pub(super) fn decode(
        id: u32,
        data: &IdentifyNamespace,
        identity: &Identity,
    ) -> Result<Option<Self>, NvmeErrorKind> {
        if data.nsze == 0 {
            return Ok(None);
        }
        let format = data.lbaf[usize::from(format_index(data))];
        let refuse = |data: String| Err(NvmeErrorKind::BlockFormat { namespace: id, data, metadata: format.metadata });
        let block_size: u32 = match format.data_shift {
            9 => 512,
            12 => 4096,
            shift @ 0..=31 => return refuse((1_u32 << shift).to_string()),
            shift => return refuse(format!("2^{shift}")),
        };
        // FLBAS bit 4: metadata follow each block's data. DPS bits 2:0: type of protection information.
        let plain = data.flbas & 1 << 4 == 0 && data.dps & 0b111 == 0 && format.metadata <= MOST_METADATA;
        if format.metadata != 0 && !plain {
            return refuse(block_size.to_string());
        }
        if data.nsze.checked_mul(block_size.into()).is_none() {
            let found = format!("{} blocks of {block_size} bytes", data.nsze);
            return Err(NvmeErrorKind::Unsuitable {
                property: "namespace size",
                found,
                wanted: "less than 2^64 bytes",
            });
        }
        let physical_block_size = physical_block(data, identity, block_size);
        let write_protected = data.nsattr & 1 == 1;
        let zeroes_deallocate = data.dlfeat & 0b1111 == 0b1001;
        Ok(Some(Self {
            id,
            identifiers: (data.nguid, data.eui64),
            blocks: data.nsze,
            block_size,
            metadata: format.metadata,
            physical_block_size,
            alignment_offset: alignment_offset(data, physical_block_size, block_size),
            optimal_size: if reports_preferences(data) { (u32::from(data.nows) + 1) * block_size } else { 0 },
            boundary: data.noiob.into(),
            write_protected,
            zones: None,
            zeroes_deallocate,
        }))
    }

    /// Describes why this is not the same namespace as `before`; `None` if it is. The size is not compared.
    pub(super) fn difference(&self, before: &Self) -> Option<String> {
        if self.identifiers != before.identifiers {
            return Some(format!("namespace {} is another one (NGUID, EUI64)", self.id));
        }
        let text = |namespace: &Self| match namespace.metadata {
            0 => namespace.block_size.to_string(),
            metadata => format!("{} and {metadata} metadata bytes", namespace.block_size),
        };
        let (blocks, former) = (text(self), text(before));
        if blocks != former {
            return Some(format!("namespace {} has blocks of {blocks} instead of {former}", self.id));
        }
        let (now, before) = (self.zones, before.zones);
        (now != before).then(|| format!("namespace {} has zones {now:?} instead of {before:?}", self.id))
    }
}

/// FLBAS: bits 3:0 are the low bits of the index of the format, bits 6:5 the high ones.
pub(super) fn format_index(data: &IdentifyNamespace) -> u8 {
    data.flbas & 0xf | (data.flbas >> 1) & 0x30
}

/// NSFEAT bit 4 (OPTPERF): NPWG, NPWA and NOWS are valid.
fn reports_preferences(data: &IdentifyNamespace) -> bool {
    data.nsfeat & 1 << 4 != 0
}

/// NSFEAT bit 1 (NSABP): NAWUPF and NABO are valid.
fn reports_atomicity(data: &IdentifyNamespace) -> bool {
    data.nsfeat & 1 << 1 != 0
}

/// How far the first physical block is from the start of the disk, bytes. Zero unless NABO lies inside a physical block.
fn alignment_offset(data: &IdentifyNamespace, physical_block: u32, block_size: u32) -> u32 {
    let offset = if reports_atomicity(data) { u32::from(data.nabo) * block_size } else { 0 };
    if offset < physical_block { offset } else { 0 }
}

/// Preferred write granularity, bytes: NPWG or NPWA, whichever is coarser, if reported (NSFEAT bit 4). But at most the atomic
/// write unit at power failure (NAWUPF if reported in NSFEAT bit 1, else AWUPF), because guests assume that a physical block
/// is written atomically.
fn physical_block(data: &IdentifyNamespace, identity: &Identity, block_size: u32) -> u32 {
    // A write should be a multiple of NPWG and start at a multiple of NPWA. A guest knows only one number.
    let preferred = if reports_preferences(data) { u32::from(data.npwg.max(data.npwa)) + 1 } else { 1 };
    let atomic = if reports_atomicity(data) { u32::from(data.nawupf) + 1 } else { identity.atomic_blocks };
    let blocks = preferred.min(atomic);
    // No overflow: at most 65536 blocks of 4096 bytes.
    if blocks.is_power_of_two() { blocks * block_size } else { block_size }
}

/// The identifiers in an Active Namespace ID list, which are increasing and end with zero. NVMe 2.0 §5.17.2.2
pub(super) fn active_namespaces(list: &[u8; 4096]) -> Vec<u32> {
    let words = list.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("chunks of four")));
    let mut last = 0;
    words
        .take_while(|&id| {
            let increasing = id > last;
            last = id;
            increasing
        })
        .collect()
}

/// Selects the requested namespace, or the only active one if none is requested.
pub(super) fn select_namespace(wanted: Option<u32>, active: &[u32]) -> Result<u32, NvmeErrorKind> {
    match (wanted, active) {
        (_, []) => Err(NvmeErrorKind::NoActiveNamespace),
        (None, &[only]) => Ok(only),
        (None, several) => Err(NvmeErrorKind::SeveralNamespaces { existing: format_ids(several) }),
        (Some(id), active) if active.contains(&id) => Ok(id),
        (Some(wanted), active) => Err(NvmeErrorKind::NamespaceNotFound { wanted, existing: format_ids(active) }),
    }
}

/// Formats the first few identifiers for an error message.
pub(super) fn format_ids(ids: &[u32]) -> String {
    const SHOWN: usize = 16;
    let mut text: Vec<String> = ids.iter().take(SHOWN).map(u32::to_string).collect();
    if ids.len() > SHOWN {
        text.push(format!("… ({} in all)", ids.len()));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests;
