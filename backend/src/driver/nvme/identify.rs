//! What the controller says about itself and its namespaces, and whether that can be served.
//!
//! The answers come from a device, so nothing in them is believed to be in range: each `decode` is a pure function from
//! Identify data to checked values, or to the reason why not.

use std::time::Duration;

use super::error::Cause;
use super::prp::MAX_LISTED;
use super::sgl::Granularity;
use super::spec::{IdentifyController, IdentifyNamespace, IdentifyNvmController, MAX_RANGES, NAMESPACE_NOTICES};
use crate::driver::{DiscardLimits, ZeroesLimits};

/// The longest transfer of a controller that names no limit, bytes.
const UNLIMITED_TRANSFER: u32 = 1 << 20;
/// How long a shutdown may take at least, and at most, whatever RTD3E says: a drive that writes back a large cache takes
/// seconds, one that takes a minute will not end.
const SHUTDOWN_LIMITS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// The controller, as far as this driver cares.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) serial: String,
    pub(super) model: String,
    pub(super) firmware: String,
    /// Longest transfer, bytes.
    pub(super) max_transfer: u32,
    /// VWC bit 0: there is a volatile write cache (which may be off).
    pub(super) write_cache: bool,
    /// How long a shutdown may take.
    pub(super) shutdown_limit: Duration,
    /// NN: the highest valid namespace identifier.
    pub(super) namespaces: u32,
    /// AWUPF, as blocks.
    atomic_blocks: u32,
    /// SGLS: what SGLs can name, if there are any.
    pub(super) sgl: Option<Granularity>,
    /// OAES bit 8: says when the namespace has changed.
    pub(super) notices: bool,
    /// ONCS bit 2: Dataset Management.
    dataset_management: bool,
    /// ONCS bit 3: Write Zeroes.
    write_zeroes: bool,
}

impl Identity {
    /// Checks Identify Controller data. NVMe 2.0 §5.17.2.1
    pub(super) fn decode(data: &IdentifyController) -> Result<Self, Cause> {
        // CNTRLTYPE: 0 not reported, 1 I/O, 2 discovery, 3 administrative.
        if data.cntrltype > 1 {
            let found = format!("{} (no I/O controller)", data.cntrltype);
            return Err(Cause::Unsuitable { property: "controller type", found, wanted: "1" });
        }
        entry_size("submission queue entry sizes (SQES)", data.sqes, 6, "6 (64 bytes) in the range")?;
        entry_size("completion queue entry sizes (CQES)", data.cqes, 4, "4 (16 bytes) in the range")?;
        let (least, most) = SHUTDOWN_LIMITS;
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
            notices: data.oaes & NAMESPACE_NOTICES != 0,
            dataset_management: data.oncs & 1 << 2 != 0,
            write_zeroes: data.oncs & 1 << 3 != 0,
        })
    }
}

/// What discard and write-zeroes can take on a namespace; `limits` are those of the controller, if it tells them.
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

/// Zero is no limit.
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

/// Without WZSL, MDTS bounds the command: it should not (NVM Command Set 1.0 §3.2.8), but there are controllers on which it
/// does, and Linux is as careful.
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
fn entry_size(property: &'static str, sizes: u8, shift: u8, wanted: &'static str) -> Result<(), Cause> {
    if (sizes & 0xf..=sizes >> 4).contains(&shift) {
        return Ok(());
    }
    Err(Cause::Unsuitable { property, found: format!("{} to {}", sizes & 0xf, sizes >> 4), wanted })
}

/// MDTS is a power of two of the smallest page, which is 4 KiB here (`Controller::open` accepts no other).
fn max_transfer(mdts: u8) -> u32 {
    match mdts {
        0 => UNLIMITED_TRANSFER,
        1..=8 => 4096 << mdts,
        _ => MAX_LISTED,
    }
}

/// Text from a device, fit for a terminal and for a guest: printable ASCII, no padding.
pub(super) fn printable(text: &[u8]) -> String {
    let clean = |&byte: &u8| if byte == b' ' || byte.is_ascii_graphic() { char::from(byte) } else { '?' };
    let unpadded = text.trim_ascii_end();
    let end = unpadded.iter().rposition(|&byte| byte != 0 && byte != b' ').map_or(0, |last| last + 1);
    unpadded[..end].trim_ascii_start().iter().map(clean).collect()
}

/// A namespace that can be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) id: u32,
    /// NGUID and EUI64, each zero where it has none: no other namespace has the same, whatever its number.
    pub(super) unique: ([u8; 16], [u8; 8]),
    /// NSZE, logical blocks.
    pub(super) blocks: u64,
    /// Bytes of a logical block.
    pub(super) block_size: u32,
    /// Preferred write granularity, bytes.
    pub(super) physical_block_size: u32,
    /// NSATTR bit 0.
    pub(super) write_protected: bool,
    /// DLFEAT: Write Zeroes may deallocate (bit 3), and deallocated blocks read as zeroes (bits 2:0 = 001b).
    pub(super) zeroes_deallocate: bool,
}

impl Namespace {
    /// Checks Identify Namespace data; `None` if the namespace is inactive. NVM Command Set 1.0 §4.1.5.1
    pub(super) fn decode(id: u32, data: &IdentifyNamespace, identity: &Identity) -> Result<Option<Self>, Cause> {
        if data.nsze == 0 {
            return Ok(None);
        }
        // FLBAS: index bits 3:0 and, for more than 16 formats, 6:5 above them.
        let index = data.flbas & 0xf | (data.flbas >> 1) & 0x30;
        let format = data.lbaf[usize::from(index)];
        let refuse = |data: String| Err(Cause::BlockFormat { namespace: id, data, metadata: format.metadata });
        let block_size: u32 = match format.data_shift {
            9 => 512,
            12 => 4096,
            shift @ 0..=31 => return refuse((1_u32 << shift).to_string()),
            shift => return refuse(format!("2^{shift}")),
        };
        if format.metadata != 0 {
            return refuse(block_size.to_string());
        }
        if data.nsze.checked_mul(block_size.into()).is_none() {
            let found = format!("{} blocks of {block_size} bytes", data.nsze);
            return Err(Cause::Unsuitable { property: "namespace size", found, wanted: "less than 2^64 bytes" });
        }
        let physical_block_size = physical_block(data, identity, block_size);
        let write_protected = data.nsattr & 1 == 1;
        let zeroes_deallocate = data.dlfeat & 0b1111 == 0b1001;
        Ok(Some(Self {
            id,
            unique: (data.nguid, data.eui64),
            blocks: data.nsze,
            block_size,
            physical_block_size,
            write_protected,
            zeroes_deallocate,
        }))
    }

    /// How it has become another one than `before`, if it has. It may have another size.
    pub(super) fn change(&self, before: &Self) -> Option<String> {
        if self.unique != before.unique {
            return Some(format!("namespace {} is another one (NGUID, EUI64)", self.id));
        }
        let (now, before) = (self.block_size, before.block_size);
        (now != before).then(|| format!("namespace {} has blocks of {now} instead of {before}", self.id))
    }
}

/// What writes should be multiples of: NPWG where given (NSFEAT bit 4), but no more than what survives a power failure in
/// one piece (NAWUPF, NSFEAT bit 1, else AWUPF), because a guest may take it for that.
fn physical_block(data: &IdentifyNamespace, identity: &Identity, block_size: u32) -> u32 {
    let preferred = if data.nsfeat & 1 << 4 != 0 { u32::from(data.npwg) + 1 } else { 1 };
    let atomic = if data.nsfeat & 1 << 1 != 0 { u32::from(data.nawupf) + 1 } else { identity.atomic_blocks };
    let blocks = preferred.min(atomic);
    // At most 65536 blocks of 4096 bytes.
    if blocks.is_power_of_two() { blocks * block_size } else { block_size }
}

/// The identifiers in an Active Namespace ID list (NVMe 2.0 §5.17.2.2): increasing, ended by zero.
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

/// Picks the namespace asked for, else the only one.
pub(super) fn choose(wanted: Option<u32>, active: &[u32]) -> Result<u32, Cause> {
    match (wanted, active) {
        (_, []) => Err(Cause::Empty),
        (None, &[only]) => Ok(only),
        (None, several) => Err(Cause::SeveralNamespaces { existing: listed(several) }),
        (Some(id), active) if active.contains(&id) => Ok(id),
        (Some(wanted), active) => Err(Cause::NoNamespace { wanted, existing: listed(active) }),
    }
}

/// The first few, as a person would list them.
pub(super) fn listed(ids: &[u32]) -> String {
    const SHOWN: usize = 16;
    let mut text: Vec<String> = ids.iter().take(SHOWN).map(u32::to_string).collect();
    if ids.len() > SHOWN {
        text.push(format!("… ({} in all)", ids.len()));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests;
