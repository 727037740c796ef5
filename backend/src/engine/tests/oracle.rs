//! Compares the split ring with `virtio-queue` on the same memory: both pop random chains, valid and invalid.
//!
//! For valid chains both must agree. `virtio-queue` hides errors: a bad link ends a chain early, a loop is cut after as many
//! descriptors as the ring has, a chain of 4 GiB ends before its last buffer, and it accepts INDIRECT with NEXT and buffers
//! in the wrong order. For these the oracle is [`expected_chain`] alone, a simple implementation of the specification.

use std::collections::HashSet;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::bare::{region, setup};
use super::rig::{Desc, INDIRECT, NEXT, WRITE};
use crate::addr::{Gpa, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::chain::{Chain, ChainFault, Head};
use crate::engine::virtqueue::split::SplitRing;
use crate::engine::{Layout, VringSetup};
use crate::memory::MemTable;

const SIZE: u16 = 8;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Two indirect tables of at most sixteen entries.
const TABLES: [u64; 2] = [0x4000, 0x5000];
const TABLE_ENTRIES: u16 = 16;
const MEMORY: u64 = 0x1_0000;

#[derive(Clone, Debug)]
struct RingContents {
    table: Vec<Desc>,
    indirect: [Vec<Desc>; 2],
    heads: Vec<u16>,
}

/// The result that the specification requires.
#[derive(Debug, PartialEq)]
enum Expected {
    /// Buffers in order: address, length, writable.
    Valid(Vec<(u64, u32, bool)>),
    /// The walk cannot reach the end of the chain.
    BadLink,
    /// The walk reaches the end, but a buffer is invalid.
    BadBuffer,
}

/// Reads a chain as virtio 1.2 §2.7.5 specifies.
fn expected_chain(contents: &RingContents, head: u16) -> Expected {
    let mut buffers = Vec::new();
    let (mut table, mut index, mut nested) = (&contents.table[..], head, false);
    let mut seen = HashSet::new();
    loop {
        let Some(desc) = table.get(usize::from(index)) else { return Expected::BadLink };
        if !seen.insert((nested, index)) {
            return Expected::BadLink;
        }
        if desc.flags & INDIRECT != 0 {
            let place = TABLES.iter().position(|&start| start == desc.addr);
            let entries = desc.len / 16;
            if nested || desc.flags & NEXT != 0 || !desc.len.is_multiple_of(16) || entries == 0 {
                return Expected::BadLink;
            }
            let Some(place) = place else { return Expected::BadLink };
            // The memory behind a shorter table has entries too, but links past the table's end are bad.
            table = &contents.indirect[place][..entries as usize];
            (index, nested) = (0, true);
            continue;
        }
        buffers.push((desc.addr, desc.len, desc.flags & WRITE != 0));
        if desc.flags & NEXT == 0 {
            break;
        }
        index = desc.next;
    }
    let wraps = |&(addr, len, _): &(u64, u32, bool)| len != 0 && addr.checked_add(u64::from(len) - 1).is_none();
    buffers.retain(|&(_, len, _)| len != 0);
    let ordered = buffers.is_sorted_by_key(|&(_, _, writable)| writable);
    if !ordered || buffers.iter().any(wraps) { Expected::BadBuffer } else { Expected::Valid(buffers) }
}

/// Our ring and the oracle's, in the same memory.
struct RingPair {
    ours: GuestMemoryView,
    ring: SplitRing,
    memory: GuestMemoryMmap,
    oracle: Queue,
}

fn rings(contents: &RingContents) -> RingPair {
    let (region, file) = region(MEMORY);
    let place = FileOffset::from_arc(file, 0);
    let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(place))]).unwrap();
    write(contents, &memory);

    let table = Arc::new(MemTable::new(vec![Arc::new(region)]).unwrap());
    let ring = SplitRing::new(&setup(Layout::Split, SIZE, [DESC, AVAIL, USED]), &table).unwrap();
    let mut ours = GuestMemoryView::default();
    ours.publish(table);
    let mut oracle = Queue::new(SIZE).unwrap();
    oracle.set_desc_table_address(Some(DESC as u32), Some(0));
    oracle.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    oracle.set_used_ring_address(Some(USED as u32), Some(0));
    oracle.set_ready(true);
    assert!(oracle.is_valid(&memory));
    RingPair { ours, ring, memory, oracle }
}

fn write(contents: &RingContents, memory: &GuestMemoryMmap) {
    let tables = [(DESC, &contents.table), (TABLES[0], &contents.indirect[0]), (TABLES[1], &contents.indirect[1])];
    for (start, descs) in tables {
        for (n, desc) in descs.iter().enumerate() {
            let at = start + 16 * n as u64;
            memory.write_obj(desc.addr, GuestAddress(at)).unwrap();
            memory.write_obj(desc.len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(desc.flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(desc.next, GuestAddress(at + 14)).unwrap();
        }
    }
    for (n, head) in contents.heads.iter().enumerate() {
        memory.write_obj(*head, GuestAddress(AVAIL + 4 + 2 * n as u64)).unwrap();
    }
    memory.write_obj(contents.heads.len() as u16, GuestAddress(AVAIL + 2)).unwrap();
}

fn descriptor(entries: u16) -> impl Strategy<Value = Desc> {
    let buffer = (0x6000..0x7000_u64, 0..0x800_u32);
    let odd = prop_oneof![Just((u64::MAX, 1)), Just((u64::MAX, 2)), Just((0x6000, 0)), (any::<u64>(), any::<u32>())];
    let indirect = (prop::sample::select(TABLES.to_vec()), 0..=u32::from(TABLE_ENTRIES) * 16);
    let whole_table =
        (prop::sample::select(TABLES.to_vec()), 1..=u32::from(TABLE_ENTRIES)).prop_map(|(addr, n)| (addr, n * 16));
    let next = prop_oneof![20 => 0..entries, 1 => any::<u16>()];
    let plain = prop_oneof![10 => Just(NEXT), 3 => Just(0), 10 => Just(NEXT | WRITE), 6 => Just(WRITE)];
    prop_oneof![
        30 => (buffer, plain, next.clone()),
        1 => (odd, 0..8_u16, next.clone()),
        2 => (indirect, prop_oneof![9 => Just(INDIRECT), 1 => 0..8_u16], next.clone()),
        5 => (whole_table, prop_oneof![9 => Just(INDIRECT), 1 => Just(INDIRECT | WRITE)], next),
    ]
    .prop_map(|((addr, len), flags, next)| Desc { addr, len, flags, next })
}

fn contents() -> impl Strategy<Value = RingContents> {
    let table = prop::collection::vec(descriptor(SIZE), usize::from(SIZE));
    let indirect = || prop::collection::vec(descriptor(TABLE_ENTRIES), usize::from(TABLE_ENTRIES));
    let heads = prop::collection::vec(0..SIZE, 1..=usize::from(SIZE));
    (table, indirect(), indirect(), heads).prop_map(|(table, one, two, heads)| RingContents {
        table,
        indirect: [one, two],
        heads,
    })
}

fn buffers(chain: &Chain) -> Vec<(u64, u32, bool)> {
    let part = |spans: &[Span<Gpa>], writable| {
        let flat = spans.iter().map(|span| (span.start().0, span.len() as u32, writable));
        flat.collect::<Vec<_>>()
    };
    [part(chain.readable(), false), part(chain.writable(), true)].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn chains_agree_with_virtio_queue_and_the_specification(contents in contents()) {
        let mut rings = rings(&contents);
        let mut chain = Chain::default();
        prop_assert_eq!(usize::from(rings.ring.available().unwrap()), contents.heads.len());
        for &head in &contents.heads {
            rings.ring.take(&mut rings.ours, &mut chain).unwrap();
            let popped = rings.oracle.pop_descriptor_chain(&rings.memory).unwrap();
            prop_assert_eq!((chain.head().id(), popped.head_index()), (head, head));
            match expected_chain(&contents, head) {
                Expected::Valid(expected) => {
                    let device = |desc: &virtio_queue::desc::split::Descriptor| desc.len() != 0;
                    let oracle: Vec<_> =
                        popped.filter(device).map(|d| (d.addr().0, d.len(), d.is_write_only())).collect();
                    let bytes: u64 = expected.iter().map(|&(_, len, _)| u64::from(len)).sum();
                    if bytes <= u64::from(u32::MAX) {
                        prop_assert_eq!(&oracle, &expected);
                    }
                    prop_assert_eq!(buffers(&chain), expected);
                    prop_assert_eq!(chain.fault(), None);
                }
                Expected::BadLink => {
                    prop_assert!(chain.fault().is_some());
                    prop_assert_eq!(chain.last_writable(), None);
                }
                Expected::BadBuffer => {
                    let fault = chain.fault();
                    prop_assert!(matches!(fault, Some(ChainFault::BufferOrder | ChainFault::Wraps { .. })), "{:?}", fault);
                }
            }
        }
    }

    #[test]
    fn used_entries_and_notifications_agree_with_virtio_queue(
        batches in prop::collection::vec((1..=SIZE, any::<u16>(), any::<bool>()), 1..200),
        start in any::<u16>(),
    ) {
        let plain = Desc { addr: 0x6000, len: 1, flags: WRITE, next: 0 };
        let contents = RingContents { table: vec![plain; SIZE.into()], indirect: [vec![], vec![]], heads: vec![0] };
        let mut rings = rings(&contents);
        let memory = &rings.memory;
        memory.write_obj(start, GuestAddress(USED + 2)).unwrap();
        let setup = VringSetup { event_idx: true, ..setup(Layout::Split, SIZE, [DESC, AVAIL, USED]) };
        let mut ring = SplitRing::new(&setup, rings.ours.table()).unwrap();
        rings.oracle.set_next_used(start);
        rings.oracle.set_event_idx(true);
        let (mut idx, mut first) = (start, true);
        for (count, event, near) in batches {
            // Choose half of the events near the index.
            let event = if near { idx.wrapping_add(event % 16).wrapping_sub(8) } else { event };
            memory.write_obj(event, GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE))).unwrap();
            for n in 0..count {
                rings.oracle.add_used(memory, n, u32::from(event) + u32::from(n)).unwrap();
            }
            let expected = rings.oracle.needs_notification(memory).unwrap();
            let mut oracle = [0_u8; 8 * SIZE as usize];
            memory.read_slice(&mut oracle, GuestAddress(USED + 4)).unwrap();
            memory.write_obj(idx, GuestAddress(USED + 2)).unwrap();

            for n in 0..count {
                ring.push_used(Head::new(n, 0), u32::from(event) + u32::from(n));
            }
            prop_assert!(ring.has_unpublished());
            prop_assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), idx);
            // The first publication always notifies, as in the kernel's vhost: an earlier entry may not have been announced.
            prop_assert_eq!(ring.publish(), std::mem::take(&mut first) || expected);

            idx = idx.wrapping_add(count);
            let mut ours = [0_u8; 8 * SIZE as usize];
            memory.read_slice(&mut ours, GuestAddress(USED + 4)).unwrap();
            prop_assert_eq!(ours, oracle);
            prop_assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), idx);
        }
    }
}
