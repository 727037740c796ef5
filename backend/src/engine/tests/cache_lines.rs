//! Two workers write no cache line in common: a line that two processors write moves between them at each request.

use std::ops::Range;

use super::disk::DiskOptions;
use super::rig::Rig;
use crate::driver::nvme::queue::IoQueue;
use crate::engine::data_path::VringSlot;
use crate::engine::statistics::{Counters, RingCounters};
use crate::engine::worker::Worker;

/// Bytes of two lines, which x86 fetches together.
const LINES: usize = 128;

/// The pairs of lines on which `written` lies.
fn lines<T>(written: &[T]) -> Range<usize> {
    let start = written.as_ptr() as usize;
    start / LINES..(start + size_of_val(written)).div_ceil(LINES)
}

#[test]
fn what_a_worker_writes_is_aligned_to_pairs_of_cache_lines() {
    for (what, alignment) in [
        ("worker", align_of::<Worker>()),
        ("vring", align_of::<VringSlot>()),
        ("counters", align_of::<Counters>()),
        ("counters of a ring", align_of::<RingCounters>()),
        ("queue pair", align_of::<IoQueue>()),
    ] {
        assert!(alignment.is_multiple_of(LINES), "{what}: aligned to {alignment} bytes");
    }
}

#[test]
fn the_counters_of_two_workers_share_no_cache_line() {
    let rig = Rig::new(DiskOptions { queues: 4, ..DiskOptions::default() });

    let written = |worker: &super::super::WorkerHandle| {
        [lines(std::slice::from_ref(&*worker.counters)), lines(&worker.counters.rings)]
    };
    let written: Vec<_> = rig.engine.workers.iter().map(written).collect();

    for (n, one) in written.iter().enumerate() {
        for (one, other) in written[..n].iter().flatten().flat_map(|other| one.iter().map(move |one| (one, other))) {
            assert!(one.end <= other.start || other.end <= one.start, "lines {one:?} and {other:?}");
        }
    }
}
