//! Records that a front-end has filled with anything. Recovery ends without a panic, and what it resumes is consistent.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::{packed_recovery, split_recovery};
use crate::engine::virtqueue::position::Position;
use packed_recovery::{PackedEntry, PackedRecord, PackedRecovery, PackedState};
use split_recovery::{SplitEntry, SplitRecord, SplitRecovery, SplitState};

/// Mostly small numbers, so that many records are nearly right.
fn small() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 0_u16..6, 1 => any::<u16>()]
}

fn flag() -> impl Strategy<Value = u8> {
    prop_oneof![4 => 0_u8..2, 1 => any::<u8>()]
}

fn version() -> impl Strategy<Value = u16> {
    prop_oneof![8 => Just(1_u16), 1 => 0_u16..3]
}

fn counter() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0_u64..16, 1 => any::<u64>()]
}

prop_compose! {
    fn split_record()(
        version in version(),
        (desc_num, last_batch_head, used_idx) in (Just(4_u16), small(), small()),
        entries in vec((flag(), small(), counter()), 4),
    ) -> SplitRecord {
        let entry = |(inflight, next, counter)| SplitEntry { inflight, next, counter };
        let entries = entries.into_iter().map(entry).collect();
        SplitRecord { features: 0, version, desc_num, last_batch_head, used_idx, entries }
    }
}

prop_compose! {
    fn packed_record()(
        version in version(),
        heads in (small(), small()),
        used in (small(), small(), flag(), flag()),
        entries in vec((flag(), (small(), small(), small()), counter(), small()), 4),
    ) -> PackedRecord {
        let entry = |(inflight, (next, last, num), counter, flags)| {
            PackedEntry { inflight, next, last, num, counter, flags, ..PackedEntry::default() }
        };
        PackedRecord {
            features: 0,
            version,
            desc_num: 4,
            free_head: heads.0,
            old_free_head: heads.1,
            used_idx: used.0,
            old_used_idx: used.1,
            used_wrap_counter: used.2,
            old_used_wrap_counter: used.3,
            entries: entries.into_iter().map(entry).collect(),
        }
    }
}

/// True if no two are equal.
fn distinct(mut values: Vec<u16>) -> bool {
    let len = values.len();
    values.sort_unstable();
    values.dedup();
    values.len() == len
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn a_hostile_split_record_is_refused_or_resumed_consistently(
        record in split_record(),
        (size, used_idx, offered, base) in (prop_oneof![Just(4_u16), Just(2_u16)], small(), 0_u16..6, small()),
    ) {
        let avail_idx = used_idx.wrapping_add(offered);
        let ring = SplitState { size, used_idx, avail_idx, base };
        if let Ok(SplitRecovery::Resume(plan)) = split_recovery::recover(&record, 4, &ring) {
            let counters: Vec<_> = plan.requests.iter().map(|&head| record.entries[usize::from(head)].counter).collect();
            prop_assert!(counters.is_sorted_by(|one, next| one < next));
            prop_assert!(plan.requests.iter().all(|&head| head < size && !plan.published.contains(&head)));
            prop_assert_eq!(plan.next_avail.wrapping_sub(used_idx), plan.requests.len() as u16);
            prop_assert!(plan.requests.len() <= offered.into() && plan.published.len() <= size.into());
            prop_assert!(distinct([plan.requests, plan.published].concat()));
        }
    }

    #[test]
    fn a_hostile_packed_record_is_refused_or_resumed_consistently(
        record in packed_record(),
        (size, old_used_flags) in (prop_oneof![Just(4_u16), Just(3_u16)], any::<u16>()),
    ) {
        let base = Some(Position { slot: 0, wrap: true });
        let ring = PackedState { size, old_used_flags, base };
        if let Ok(PackedRecovery::Resume(plan)) = packed_recovery::recover(&record, 4, &ring) {
            let heads: Vec<_> = plan.requests.iter().map(|request| request.entry).collect();
            let counters: Vec<_> = heads.iter().map(|&head| record.entries[usize::from(head)].counter).collect();
            prop_assert!(counters.is_sorted_by(|one, next| one < next));
            let descriptors: usize = plan.requests.iter().map(|request| request.descriptors.len()).sum();
            prop_assert!(descriptors == usize::from(plan.taken) && plan.taken <= size && plan.used.slot < size);
            prop_assert!(distinct([heads, plan.stale].concat()));
        }
    }
}
