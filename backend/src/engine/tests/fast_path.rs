//! Compares the fast path with the general path on the same memory: a request that the fast path accepts must give the same
//! transfer on the general path.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::bare;
use super::rig::{Desc, INDIRECT, NEXT, WRITE};
use crate::addr::{Gpa, IovaSlice, Span};
use crate::driver::Geometry;
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::Transfer;
use crate::engine::request::{Data, Disk, Job, Operation, parse};
use crate::engine::virtqueue::Virtqueue;
use crate::engine::virtqueue::chain::Chain;
use crate::engine::{Layout, LiveGeometry, VringSetup};
use crate::memory::MemTable;

const MEMORY: u64 = 0x1_0000;
const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const HEADER: u64 = 0x5000;
const SIZE: u16 = 8;
/// VIRTQ_DESC_F_AVAIL in the first round of a packed ring.
const AVAIL: u16 = 0x80;
const SECTORS: u64 = 64;

/// Layout of the ring, and whether the request uses an indirect table.
#[derive(Clone, Copy, Debug)]
struct Placement {
    layout: Layout,
    indirect: bool,
}

#[derive(Clone, Debug)]
struct TestRequest {
    placement: Placement,
    kind: u32,
    sector: u64,
    descs: [Desc; 3],
    /// Length and flags of the indirect descriptor.
    table: (u32, u16),
    negotiated: bool,
    block_size: u32,
    read_only: bool,
}

/// A request as drivers build it.
fn well_formed(placement: Placement, write: bool, sector: u64, data: (u64, u32)) -> TestRequest {
    let direction = if write { 0 } else { WRITE };
    TestRequest {
        placement,
        kind: u32::from(write),
        sector,
        descs: [
            Desc { addr: HEADER, len: 16, flags: NEXT, next: 1 },
            Desc { addr: data.0, len: data.1, flags: NEXT | direction, next: 2 },
            Desc { addr: HEADER + 16, len: 1, flags: WRITE, next: 0 },
        ],
        table: (48, INDIRECT),
        negotiated: true,
        block_size: 512,
        read_only: false,
    }
}

fn setup(request: &TestRequest) -> VringSetup {
    let ring = bare::setup(request.placement.layout, SIZE, [DESC, DRIVER, DEVICE]);
    VringSetup { indirect: request.negotiated, ..ring }
}

/// Guest memory with the request available in its ring.
fn guest(request: &TestRequest) -> GuestMemoryView {
    let (region, _) = bare::region(MEMORY);
    let memory = region.memory();
    let packed = request.placement.layout == Layout::Packed;
    let put = |at: u64, desc: Desc, avail: u16| {
        let ends = if packed { [7, desc.flags | avail] } else { [desc.flags, desc.next] };
        let at = usize::try_from(at).unwrap();
        memory.write_u64(at, desc.addr);
        memory.write_u32(at + 8, desc.len);
        memory.write_u16(at + 12, ends[0]);
        memory.write_u16(at + 14, ends[1]);
    };
    let (start, avail) = if request.placement.indirect { (TABLE, 0) } else { (DESC, AVAIL) };
    for (at, desc) in (start..).step_by(16).zip(request.descs) {
        put(at, desc, avail);
    }
    if request.placement.indirect {
        let (len, flags) = request.table;
        put(DESC, Desc { addr: TABLE, len, flags, next: 0 }, AVAIL);
    }
    memory.write_u32(usize::try_from(HEADER).unwrap(), request.kind);
    memory.write_u64(usize::try_from(HEADER).unwrap() + 8, request.sector);
    if !packed {
        memory.write_u16(usize::try_from(DRIVER).unwrap() + 2, 1);
    }
    let mut guest = GuestMemoryView::default();
    guest.publish(Arc::new(MemTable::new(vec![Arc::new(region)]).unwrap()));
    guest
}

fn disk(request: &TestRequest) -> Disk {
    let blocks = SECTORS * 512 / u64::from(request.block_size);
    let geometry =
        Geometry { blocks, block_size: request.block_size, read_only: request.read_only, ..Geometry::default() };
    Disk::new(&geometry, Arc::new(LiveGeometry::of(&geometry)))
}

/// The fast path's transfer, the head, and the ring's base after it.
fn fast_transfer(request: &TestRequest) -> Option<(Transfer, u16, u32)> {
    let mut guest = guest(request);
    let mut queue = Virtqueue::new(&setup(request), guest.table()).unwrap();
    assert_ne!(queue.available().unwrap(), 0);
    let fast = queue.peek_fast(&mut guest)?;
    let Some(transfer) = Transfer::of(&fast, &mut guest, &disk(request)) else {
        queue.leave_fast(fast);
        return None;
    };
    let head = queue.take_fast(fast);
    Some((transfer, head.id(), queue.base()))
}

/// The same from the general path, if the request is a transfer of one buffer.
fn general_transfer(request: &TestRequest) -> Option<(Transfer, u16, u32)> {
    let mut guest = guest(request);
    let mut queue = Virtqueue::new(&setup(request), guest.table()).unwrap();
    let (mut chain, mut data) = (Chain::default(), Data::default());
    if !queue.take(&mut guest, &mut chain).ok()? {
        return None;
    }
    let (pending_used, job) = parse(&chain, &mut guest, &disk(request), &mut data);
    let status = pending_used.status();
    let head = pending_used.complete();
    let Job::Device { operation: operation @ (Operation::Read | Operation::Write), block, bytes } = job else {
        return None;
    };
    let [data] = data.buffers[..] else { return None };
    assert_eq!(data.len(), bytes);
    Some((Transfer { operation, block, data, status: status.unwrap() }, head.id(), queue.base()))
}

fn placements() -> impl Strategy<Value = Placement> {
    (prop_oneof![Just(Layout::Split), Just(Layout::Packed)], any::<bool>())
        .prop_map(|(layout, indirect)| Placement { layout, indirect })
}

/// A well-formed request with up to two fields changed.
fn mutated_request() -> impl Strategy<Value = TestRequest> {
    let start = (placements(), any::<bool>(), 0..SECTORS, 0..16_u64, 1..9_u32);
    let start = start.prop_map(|(placement, write, sector, at, blocks)| {
        well_formed(placement, write, sector, (0x6000 + at * 512, blocks * 512))
    });
    let odd_len = prop_oneof![Just(0), Just(1), Just(2), Just(15), Just(16), Just(17), Just(512), any::<u32>()];
    let odd_addr = prop_oneof![
        Just(HEADER),
        Just(HEADER + 3),
        Just(HEADER + 8),
        Just(MEMORY - 1),
        Just(MEMORY - 16),
        Just(MEMORY),
        any::<u64>()
    ];
    let change = (0..13_usize, 0..3_usize, odd_len, odd_addr, 0..8_u16, 0..=SIZE);
    (start, prop::collection::vec(change, 0..3)).prop_map(|(mut request, changes)| {
        for (field, which, len, addr, flags, next) in changes {
            let desc = &mut request.descs[which];
            match field {
                0 | 1 => desc.len = len,
                2 | 3 => desc.addr = addr,
                4 | 5 => desc.flags = flags,
                6 => desc.next = next,
                7 => request.table = (len, INDIRECT),
                8 => request.table.1 = flags,
                9 => request.negotiated = false,
                10 => request.block_size = 4096,
                11 => request.read_only = true,
                _ => (request.kind, request.sector) = (len, addr),
            }
        }
        request
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_fast_path_agrees_with_the_general_path(request in mutated_request()) {
        if let Some(accepted) = fast_transfer(&request) {
            prop_assert_eq!(Some(accepted), general_transfer(&request));
        }
    }

    #[test]
    fn the_fast_path_accepts_well_formed_requests(
        placement in placements(), write in any::<bool>(), sector in 0..SECTORS - 8, at in 0x6000..0xf000_u64, blocks in 1..8_u32,
    ) {
        let request = well_formed(placement, write, sector, (at, blocks * 512));

        let (transfer, ..) = fast_transfer(&request).ok_or_else(|| TestCaseError::fail("not accepted"))?;

        let operation = if write { Operation::Write } else { Operation::Read };
        let data = IovaSlice::WHOLE.iova(Span::new(Gpa(at), u64::from(blocks) * 512).unwrap());
        prop_assert_eq!(transfer, Transfer { operation, block: sector, data, status: Gpa(HEADER + 16) });
    }
}
