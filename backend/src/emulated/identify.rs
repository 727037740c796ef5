//! Identify data (NVMe 2.0 §5.17.2; NVM Command Set 1.0 §4.1.5). The offsets are those in the specification's figures.

use std::sync::atomic::Ordering::SeqCst;

use super::FIRMWARE;
use super::config::VENDOR;
use super::controller::Controller;
use super::event_state::{ERRORS_KEPT, EVENT_LIMIT, NAMESPACE_NOTICES};
use super::namespaces::Namespace;
use super::register_file::VERSION;
use super::sgl;
use super::traits::{AnaState, Support};
use super::zones::Zones;

/// Size of Identify data in bytes.
pub(super) const IDENTIFY_BYTES: usize = 4096;

type Page = [u8; IDENTIFY_BYTES];

const MODEL: &str = "vhost-device-vfio emulated NVMe";

/// EUI-64 of a namespace, locally administered.
fn eui64(namespace: u32) -> [u8; 8] {
    let [.., high, low] = namespace.to_be_bytes();
    [0x02, 0, 0, 0xff, 0xfe, 0, high, low]
}

fn put(page: &mut Page, offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// ASCII, padded with spaces (NVMe 2.0 §1.6).
fn put_text(page: &mut Page, offset: usize, len: usize, text: &str) {
    page[offset..offset + len].fill(b' ');
    put(page, offset, text.as_bytes());
}

/// CNS 01h: Identify Controller.
pub(super) fn controller(controller: &Controller, page: &mut Page) {
    let options = &controller.options;
    put(page, 0, &VENDOR.to_le_bytes());
    put(page, 2, &VENDOR.to_le_bytes());
    put_text(page, 4, 20, &options.serial);
    put_text(page, 24, 40, MODEL);
    put_text(page, 64, 8, FIRMWARE);
    page[77] = options.mdts;
    put(page, 80, &VERSION.to_le_bytes());
    put(page, 92, &NAMESPACE_NOTICES.to_le_bytes()); // OAES
    page[111] = 1; // CNTRLTYPE: I/O controller
    page[258] = 3; // ACL: four Aborts at once
    page[259] = u8::try_from(EVENT_LIMIT - 1).expect("a small constant"); // AERL
    page[260] = 0b11; // FRMW: one slot, read only
    page[261] = 0b100; // LPA: offsets and long lengths
    page[262] = u8::try_from(ERRORS_KEPT - 1).expect("a small constant"); // ELPE
    put(page, 266, &343_u16.to_le_bytes()); // WCTEMP, kelvin
    put(page, 268, &353_u16.to_le_bytes()); // CCTEMP, kelvin
    page[512] = 0x66; // SQES: 64 bytes, no other
    page[513] = 0x44; // CQES: 16 bytes, no other
    put(page, 516, &controller.namespaces.count().to_le_bytes()); // NN
    let has = |support: Support| u16::from(support != Support::No);
    let commands = has(options.traits.deallocate) << 2 | has(options.traits.write_zeroes) << 3;
    put(page, 520, &commands.to_le_bytes()); // ONCS: Dataset Management, Write Zeroes
    if options.traits.ana.is_some() {
        page[76] = 1 << 3; // CMIC: Asymmetric Namespace Access Reporting
        page[342] = 2; // ANATT, seconds
        page[343] = 0b1_1111; // ANACAP: every state is reported
        put(page, 344, &1_u32.to_le_bytes()); // ANAGRPMAX
        put(page, 348, &1_u32.to_le_bytes()); // NANAGRPID
    }
    page[525] = 0b110 | u8::from(options.volatile_cache); // VWC: Flush takes FFFFFFFFh; cache present
    if options.sgl {
        put(page, 536, &sgl::SUPPORT.to_le_bytes());
    }
    put(page, 768, b"nqn.2014-08.org.nvmexpress:uuid:6b2c1fd0-0b1e-4a9f-9a53-0d6f0e6a7c11\0");
}

/// CNS 00h: Identify Namespace.
pub(super) fn namespace(controller: &Controller, namespace: &Namespace, page: &mut Page) {
    let blocks = namespace.blocks.load(SeqCst);
    for offset in [0, 8, 16] {
        put(page, offset, &blocks.to_le_bytes()); // NSZE, NCAP, NUSE
    }
    let traits = &controller.options.traits;
    if matches!(controller.ana(), Some(AnaState::Inaccessible | AnaState::PersistentLoss)) {
        page[..24].fill(0); // the capacity is unknown (NVMe 2.0 §8.1.3.3)
    }
    if controller.ana().is_some() {
        put(page, 92, &1_u32.to_le_bytes()); // ANAGRPID
    }
    page[24] = u8::from(traits.atomic_blocks != 0) << 1 | u8::from(traits.reports_preferences()) << 4; // NSFEAT
    put(page, 36, &traits.atomic_blocks.saturating_sub(1).to_le_bytes()); // NAWUPF
    put(page, 42, &traits.atomic_offset.to_le_bytes()); // NABO
    put(page, 46, &traits.io_boundary.to_le_bytes()); // NOIOB
    put(page, 64, &traits.write_granularity.saturating_sub(1).to_le_bytes()); // NPWG
    put(page, 66, &traits.write_alignment.saturating_sub(1).to_le_bytes()); // NPWA
    put(page, 72, &traits.write_size.saturating_sub(1).to_le_bytes()); // NOWS
    page[33] = 0b1001; // DLFEAT: Write Zeroes deallocates, deallocated blocks read as zero
    let capacity = u128::from(blocks) * u128::from(controller.options.lba);
    put(page, 48, &capacity.to_le_bytes()); // NVMCAP
    put(page, 120, &eui64(namespace.id));
    let shift = controller.options.lba.trailing_zeros();
    put(page, 128, &(shift << 16 | u32::from(traits.metadata)).to_le_bytes()); // LBAF0: LBADS, MS
    page[27] = u8::from(traits.metadata != 0) << 1; // MC: metadata in a buffer of their own
}

/// CNS 02h: active namespace IDs greater than `after`.
pub(super) fn active_namespaces(controller: &Controller, after: u32, page: &mut Page) {
    for (id, at) in controller.namespaces.ids_after(after).zip((0..).step_by(4)) {
        put(page, at, &id.to_le_bytes());
    }
}

/// CNS 06h, NVM command set: limits of commands.
pub(super) fn command_limits(controller: &Controller, page: &mut Page) {
    let traits = &controller.options.traits;
    page[1] = traits.zeroes_limit; // WZSL
    page[3] = traits.discard_ranges; // DMRL
    put(page, 4, &traits.discard_range_blocks.to_le_bytes()); // DMRSL
    put(page, 8, &traits.discard_blocks.to_le_bytes()); // DMSL
}

/// CNS 03h: Namespace Identification Descriptors.
pub(super) fn descriptors(controller: &Controller, namespace: u32, page: &mut Page) {
    put(page, 0, &[0x01, 8]); // NIDT: EUI-64
    put(page, 4, &eui64(namespace));
    if let Some(set) = controller.options.command_set {
        put(page, 12, &[0x04, 1, 0, 0, set]); // NIDT: Command Set Identifier
    }
}

/// CNS 05h, Zoned Namespace command set: limits, and the size of a zone in the first format. ZNS Command Set 1.1 §4.1.5.1
pub(super) fn zoned_namespace(zones: &Zones, page: &mut Page) {
    let (active, open) = zones.limits();
    put(page, 4, &active.to_le_bytes()); // MAR
    put(page, 8, &open.to_le_bytes()); // MOR
    put(page, 2816, &zones.size().to_le_bytes()); // LBAFE0: ZSZE
}

/// CNS 06h, Zoned Namespace command set. ZNS Command Set 1.1 §4.1.5.4
pub(super) fn zoned_controller(zones: &Zones, page: &mut Page) {
    page[0] = zones.append_limit(); // ZASL
}
