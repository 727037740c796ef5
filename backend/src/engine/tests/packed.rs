//! Compares the packed ring with two models: a driver that follows the specification, and a simple reader of invalid chains.
//! There is no other implementation to compare with, so the models use lists and counts that never wrap.

use std::sync::Arc;

use proptest::prelude::*;

use super::packed_driver::*;
use super::rig::*;
use crate::addr::{Gpa, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::chain::{Chain, ChainFault, Head};
use crate::engine::virtqueue::packed::PackedRing;
use crate::memory::MemTable;

/// Two indirect tables of at most sixteen entries.
const TABLES: [u64; 2] = [DATA, DATA + 0x1000];
const TABLE_ENTRIES: u16 = 16;

struct RingFixture {
    ring: PackedRing,
    guest: GuestMemoryView,
    driver: PackedDriver,
}

fn fixture(shape: RingOptions) -> RingFixture {
    let region = region(BASE, LEN);
    let table = Arc::new(MemTable::new(vec![Arc::clone(&region)]).unwrap());
    let (driver, setup) = PackedDriver::new(region.memory().clone(), 0, shape);
    let ring = PackedRing::new(&setup, &table).unwrap();
    let mut guest = GuestMemoryView::default();
    guest.publish(table);
    RingFixture { ring, guest, driver }
}

fn buffers(chain: &Chain) -> Vec<(u64, u32, bool)> {
    let part = |spans: &[Span<Gpa>], writable| {
        let flat = spans.iter().map(|span| (span.start().0, span.len() as u32, writable));
        flat.collect::<Vec<_>>()
    };
    [part(chain.readable(), false), part(chain.writable(), true)].concat()
}

/// One step of driver or device.
#[derive(Clone, Debug)]
enum Step {
    /// The driver makes a chain available; its first `readable` buffers are device-readable.
    Offer { buffers: u16, readable: u16, indirect: bool },
    /// The device takes all available chains.
    Take,
    /// The device pushes a used descriptor for one of the chains taken.
    Return { which: usize, len: u32 },
    /// The device publishes. Before, the driver sets its event suppression: flags, and a position relative to next used.
    Publish { flags: u16, event: i64 },
    /// The device enables, then suppresses kicks.
    Arm,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..6_u16, 0..6_u16, any::<bool>())
            .prop_map(|(buffers, readable, indirect)| Step::Offer { buffers, readable, indirect }),
        3 => Just(Step::Take),
        4 => (any::<usize>(), 0..5_u32).prop_map(|(which, len)| Step::Return { which, len }),
        3 => (0..3_u16, -6..6_i64).prop_map(|(flags, event)| Step::Publish { flags, event }),
        1 => Just(Step::Arm),
    ]
}

/// The model of one chain.
#[derive(Clone, Debug)]
struct ModelChain {
    id: u16,
    descriptors: u64,
    buffers: Vec<(u64, u32, bool)>,
}

#[derive(Default)]
struct Model {
    offered: Vec<ModelChain>,
    taken: Vec<(ModelChain, Head)>,
    returned: Vec<(u32, u32)>,
    /// Count of used descriptors, now and at the last decision about a notification.
    used: u64,
    signalled_used: Option<u64>,
}

impl Model {
    fn offer(&mut self, fixture: &mut RingFixture, count: u16, readable: u16, indirect: bool) {
        let driver = &mut fixture.driver;
        let descriptors = if indirect { 1 } else { u64::from(count) };
        if !driver.has_room(descriptors) {
            return;
        }
        let serial = 0x1_0000 * self.offered.len() as u64;
        let part = |n: u16| {
            let flags = if n < readable { 0 } else { WRITE };
            (DATA + 0x10_0000 + serial + 64 * u64::from(n), 8 + u32::from(n), flags)
        };
        let parts: Vec<_> = (0..count).map(part).collect();
        // Each descriptor of the ring has its own table.
        let table = indirect.then_some(DATA + 0x100 * (driver.avail % driver.size));
        let id = driver.offer_linked(&parts, table);
        let buffers = parts.iter().map(|&(addr, len, flags)| (addr, len, flags == WRITE)).collect();
        self.offered.push(ModelChain { id, descriptors, buffers });
    }

    fn take(&mut self, fixture: &mut RingFixture) -> Result<(), TestCaseError> {
        let mut chain = Chain::default();
        prop_assert_eq!(fixture.ring.available() != 0, !self.offered.is_empty());
        for chain_model in std::mem::take(&mut self.offered) {
            prop_assert!(fixture.ring.available() != 0);
            prop_assert!(fixture.ring.take(&mut fixture.guest, &mut chain).unwrap());
            prop_assert_eq!(chain.fault(), None);
            prop_assert_eq!(buffers(&chain), &chain_model.buffers[..]);
            prop_assert_eq!(chain.head(), Head::new(chain_model.id, chain_model.descriptors as u16));
            self.taken.push((chain_model, chain.head()));
        }
        prop_assert!(!fixture.ring.take(&mut fixture.guest, &mut chain).unwrap(), "all chains have been taken");
        Ok(())
    }

    fn return_one(&mut self, fixture: &mut RingFixture, which: usize, len: u32) -> Result<(), TestCaseError> {
        if self.taken.is_empty() {
            return Ok(());
        }
        let (chain_model, head) = self.taken.remove(which % self.taken.len());
        fixture.ring.push_used(head, len);
        self.returned.push((chain_model.id.into(), len));
        self.used += chain_model.descriptors;
        prop_assert!(!fixture.driver.sees_used(), "used descriptors are invisible until they are published");
        Ok(())
    }

    fn publish(&mut self, fixture: &mut RingFixture, flags: u16, event: i64) -> Result<(), TestCaseError> {
        prop_assert_eq!(fixture.ring.has_unpublished(), !self.returned.is_empty());
        if self.returned.is_empty() {
            return Ok(());
        }
        let event = self.used.saturating_add_signed(event);
        fixture.driver.set_driver_event(fixture.driver.raw(event), flags);
        let before = self.signalled_used.replace(self.used);
        let among = |before| {
            // Positions repeat after two rounds.
            (before..self.used).any(|count| fixture.driver.raw(count) == fixture.driver.raw(event))
        };
        // The first publication always notifies: an entry from before a restart may not have been announced.
        let expected = flags == ENABLE || flags == DESC && before.is_none_or(among);
        prop_assert_eq!(fixture.ring.publish(), expected);
        let seen = fixture.driver.used();
        prop_assert_eq!(&seen, &self.returned);
        self.returned.clear();
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_conforming_driver_gets_its_chains_back(
        size in prop_oneof![1..20_u16, Just(1024)],
        start in any::<u16>(),
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let base = start % (2 * size);
        let mut fixture = fixture(RingOptions { size, event_idx: true, base });
        let mut model = Model { used: base.into(), ..Model::default() };
        for step in steps {
            match step {
                Step::Offer { buffers, readable, indirect } => model.offer(&mut fixture, buffers, readable, indirect),
                Step::Take => model.take(&mut fixture)?,
                Step::Return { which, len } => model.return_one(&mut fixture, which, len)?,
                Step::Publish { flags, event } => model.publish(&mut fixture, flags, event)?,
                Step::Arm => {
                    fixture.ring.arm();
                    let next = model.offered.iter().fold(fixture.driver.avail, |at, chain_model| at - chain_model.descriptors);
                    prop_assert_eq!(fixture.driver.device_event(), (fixture.driver.raw(next), DESC));
                    fixture.ring.disarm();
                    prop_assert_eq!(fixture.driver.device_event().1, DISABLE);
                }
            }
        }
        // In the end all chains have been returned, and the base is the final position.
        model.publish(&mut fixture, ENABLE, 0)?;
        model.take(&mut fixture)?;
        while !model.taken.is_empty() {
            model.return_one(&mut fixture, 0, 1)?;
        }
        model.publish(&mut fixture, ENABLE, 0)?;
        let end = fixture.driver.raw(fixture.driver.avail);
        prop_assert_eq!(fixture.driver.used, fixture.driver.avail);
        prop_assert_eq!(fixture.ring.base(), u32::from(end) | u32::from(end) << 16);
    }

    #[test]
    fn random_bytes_in_the_ring_do_not_affect_other_memory(
        size in 1..20_u16,
        bytes in prop::collection::vec(any::<u8>(), 16 * 20..=16 * 20),
        rounds in prop::collection::vec((any::<prop::sample::Index>(), any::<u16>(), any::<u32>(), 0..3_usize), 1..60),
    ) {
        let mut fixture = fixture(RingOptions { size, event_idx: true, base: 0 });
        let ring_bytes = 16 * usize::from(size);
        let (ring, memory) = (fixture.driver.ring, fixture.driver.guest.memory.clone());
        let outside = fixture.driver.guest.at(ring) + ring_bytes;
        memory.copy_from(outside, &[0xa5; 64]);
        fixture.driver.guest.fill(ring, &bytes[..ring_bytes]);
        let mut taken: Vec<Head> = Vec::new();
        let mut chain = Chain::default();
        for (slot, flags, event, return_one) in rounds {
            let slot = slot.index(usize::from(size)) as u64;
            memory.write_u16(fixture.driver.guest.at(ring + 16 * slot) + 14, flags);
            fixture.driver.set_driver_event((event & 0xffff) as u16, (event >> 16) as u16);
            let available = fixture.ring.available();
            let held: u16 = taken.iter().map(|head| head.entries()).sum();
            prop_assert!(available + held <= size);
            match fixture.ring.take(&mut fixture.guest, &mut chain) {
                Ok(true) => taken.push(chain.head()),
                Ok(false) => {}
                Err(_) => break,
            }
            for _ in 0..return_one.min(taken.len()) {
                fixture.ring.push_used(taken.pop().unwrap(), event);
            }
            fixture.ring.publish();
            prop_assert!(taken.iter().all(|head| (1..=size).contains(&head.entries())));
        }
        let mut after = [0; 64];
        memory.copy_to(outside, &mut after);
        prop_assert_eq!(after, [0xa5; 64]);
    }
}

/// The result that the specification requires.
#[derive(Debug, PartialEq)]
enum Expected {
    Valid(Vec<(u64, u32, bool)>),
    /// The walk cannot reach the end of the buffers.
    BadLink,
    /// The walk reaches the end, but a buffer is invalid.
    BadBuffer,
    /// The chain has no last descriptor, so it has no buffer ID.
    Endless,
}

/// Reads the chain at the start of the ring as virtio 1.2 §2.8.5 to §2.8.7 and §2.8.19 specify. Returns its length as well.
fn expected_chain(ring: &[Desc], tables: &[Vec<Desc>; 2]) -> (Expected, usize) {
    let Some(last) = ring.iter().position(|desc| desc.flags & NEXT == 0) else { return (Expected::Endless, 0) };
    let mut parts = &ring[..=last];
    if parts.len() == 1 && parts[0].flags & INDIRECT != 0 {
        let (addr, len) = (parts[0].addr, parts[0].len);
        let Some(place) = TABLES.iter().position(|&start| start == addr) else { return (Expected::BadLink, 1) };
        if !len.is_multiple_of(16) || len == 0 {
            return (Expected::BadLink, 1);
        }
        parts = &tables[place][..len as usize / 16];
    }
    if parts.iter().any(|desc| desc.flags & INDIRECT != 0) {
        return (Expected::BadLink, last + 1);
    }
    let mut found: Vec<_> = parts.iter().map(|desc| (desc.addr, desc.len, desc.flags & WRITE != 0)).collect();
    found.retain(|&(_, len, _)| len != 0);
    let wraps = |&(addr, len, _): &(u64, u32, bool)| addr.checked_add(u64::from(len) - 1).is_none();
    let valid = found.is_sorted_by_key(|&(_, _, writable)| writable) && !found.iter().any(wraps);
    (if valid { Expected::Valid(found) } else { Expected::BadBuffer }, last + 1)
}

fn descriptor() -> impl Strategy<Value = Desc> {
    let buffer = (DATA..DATA + 0x1000, 0..0x800_u32);
    let odd = prop_oneof![Just((u64::MAX, 1)), Just((u64::MAX, 2)), Just((DATA, 0)), (any::<u64>(), any::<u32>())];
    let table = (prop::sample::select(TABLES.to_vec()), 0..=u32::from(TABLE_ENTRIES) * 16);
    let whole = (prop::sample::select(TABLES.to_vec()), (1..=u32::from(TABLE_ENTRIES)).prop_map(|n| n * 16));
    let plain = prop_oneof![10 => Just(NEXT), 3 => Just(0), 10 => Just(NEXT | WRITE), 6 => Just(WRITE)];
    prop_oneof![
        30 => (buffer, plain),
        1 => (odd, 0..8_u16),
        2 => (table, prop_oneof![9 => Just(INDIRECT), 1 => 0..8_u16]),
        8 => (whole, prop_oneof![9 => Just(INDIRECT), 1 => Just(INDIRECT | WRITE)]),
    ]
    .prop_map(|((addr, len), flags)| Desc { addr, len, flags, next: 0 })
}

fn entry() -> impl Strategy<Value = Desc> {
    // NEXT and the ID are reserved in a table and must be ignored.
    let flags = prop_oneof![8 => Just(0), 1 => Just(NEXT), 10 => Just(WRITE), 1 => Just(INDIRECT)];
    (DATA..DATA + 0x1000, 0..0x800_u32, flags).prop_map(|(addr, len, flags)| Desc { addr, len, flags, next: 0x5a5a })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn chains_agree_with_the_specification(
        ring in prop::collection::vec(descriptor(), 1..10),
        sorted in any::<bool>(),
        mut one in prop::collection::vec(entry(), 16..=16),
        two in prop::collection::vec(entry(), 16..=16),
    ) {
        if sorted {
            one.sort_by_key(|desc| desc.flags);
        }
        let tables = [one, two];
        let mut fixture = fixture(RingOptions { size: ring.len() as u16, event_idx: false, base: 0 });
        for (place, table) in TABLES.iter().zip(&tables) {
            for (n, desc) in table.iter().enumerate() {
                fixture.driver.write_entry(place + 16 * n as u64, *desc);
            }
        }
        for (n, desc) in ring.iter().enumerate() {
            fixture.driver.put(n as u64, *desc, n as u16, fixture.driver.flags_at(0));
        }
        let (expected, descriptors) = expected_chain(&ring, &tables);
        let mut chain = Chain::default();

        let taken = fixture.ring.take(&mut fixture.guest, &mut chain);

        if expected == Expected::Endless {
            prop_assert!(taken.is_err());
            return Ok(());
        }
        prop_assert!(taken.unwrap());
        prop_assert_eq!(chain.head(), Head::new(descriptors as u16 - 1, descriptors as u16));
        let fault = chain.fault();
        match expected {
            Expected::Valid(expected) => {
                prop_assert_eq!(fault, None);
                prop_assert_eq!(buffers(&chain), expected);
            }
            Expected::BadLink => {
                prop_assert!(fault.is_some());
                prop_assert_eq!(chain.last_writable(), None);
            }
            Expected::BadBuffer => {
                prop_assert!(matches!(fault, Some(ChainFault::BufferOrder | ChainFault::Wraps { .. })), "{:?}", fault);
            }
            Expected::Endless => unreachable!(),
        }
    }
}

#[test]
fn a_descriptor_is_available_in_one_of_four_flag_combinations() {
    for (base, wrap) in [(0, true), (4, false)] {
        let fixture = fixture(RingOptions { size: 4, event_idx: false, base });
        for (avail, used) in [(false, false), (false, true), (true, false), (true, true)] {
            let flags = if avail { 1 << 7 } else { 0 } | if used { 1 << 15 } else { 0 };
            fixture.driver.put(0, Desc { addr: DATA, len: 1, flags: WRITE, next: 0 }, 0, flags);

            let expected = if avail == wrap && used != wrap { 4 } else { 0 };

            assert_eq!(fixture.ring.available(), expected, "AVAIL {avail} USED {used}, wrap counter {wrap}");
        }
    }
}
