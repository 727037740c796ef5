//! A front-end that copies only the pages that the log names has all of the guest's memory in the end. See
//! `tests/testbed/dirty_pages.rs`.

use testbed::dirty_pages::{Options, run};
use testbed::own_process::in_own_process;

use crate::process::PROGRAM;

/// For each of eight kinds: 10^5 in all. `tests/long/dirty_pages.sh` has ten times as many.
const REQUESTS: u64 = 12_500;

fn no_page_is_missed(packed: u32) {
    for kind in (0..8).filter(|kind| kind & 1 == packed) {
        let options = Options::new(PROGRAM.into(), REQUESTS, kind);

        let report = run(&options).unwrap_or_else(|error| panic!("{:?}: {error}", options.shape));

        println!("{:?}: {report}", options.shape);
        assert!(report.changes > 0 && report.pages > report.rounds, "{report}");
    }
}

#[test]
fn a_copy_of_the_marked_pages_is_the_memory_of_a_guest_with_split_rings() {
    if in_own_process("dirty_pages::a_copy_of_the_marked_pages_is_the_memory_of_a_guest_with_split_rings") {
        no_page_is_missed(0);
    }
}

#[test]
fn a_copy_of_the_marked_pages_is_the_memory_of_a_guest_with_packed_rings() {
    if in_own_process("dirty_pages::a_copy_of_the_marked_pages_is_the_memory_of_a_guest_with_packed_rings") {
        no_page_is_missed(1);
    }
}

/// What the killed program has written and not marked belongs to requests that the next one does again.
#[test]
fn the_copy_is_right_when_the_program_is_killed_while_pages_are_marked() {
    for (kind, seed) in (0..8).zip(1..) {
        let mut options = Options::new(PROGRAM.into(), 1500, kind);
        (options.seed, options.kill) = (seed, true);

        let report = run(&options).unwrap_or_else(|error| panic!("{:?}: {error}", options.shape));

        println!("{:?}: {report}", options.shape);
    }
}

/// The claims above mean something only if the oracle notices pages that are not copied.
#[test]
fn a_front_end_that_does_not_look_at_the_log_misses_pages() {
    let mut options = Options::new(PROGRAM.into(), 200, 0);
    options.blind = true;

    let error = run(&options).unwrap_err().to_string();

    assert!(error.contains("was written and not marked"), "{error}");
}
