//! The program is killed with requests in flight, and the next one goes on. `tests/testbed/oracle.rs` says how an error shows.

use testbed::client::Region;
use testbed::kills::{Options, run};
use testbed::own_process::in_own_process;

use crate::process::PROGRAM;

/// With both layouts, more than 50 kills. `tests/long/kills.sh` has a thousand.
const KILLS: u32 = 26;
/// More than the program could need besides its guest's memory, KiB.
const OWN_MEMORY: u64 = 16 << 10;

fn nothing_is_lost(packed: bool) {
    let options = Options::new(PROGRAM.into(), KILLS, packed);

    let report = run(&options).unwrap();

    println!("{report}");
    assert_eq!(report.kills, KILLS);
    assert!(report.resubmitted > 0, "requests were in flight when it was killed: {report}");
    assert!(report.memory.iter().all(|memory| *memory < OWN_MEMORY), "{report}");
}

#[test]
fn kills_under_load_lose_double_and_reorder_no_request_of_a_split_ring() {
    if in_own_process("kills::kills_under_load_lose_double_and_reorder_no_request_of_a_split_ring") {
        nothing_is_lost(false);
    }
}

#[test]
fn kills_under_load_lose_double_and_reorder_no_request_of_a_packed_ring() {
    if in_own_process("kills::kills_under_load_lose_double_and_reorder_no_request_of_a_packed_ring") {
        nothing_is_lost(true);
    }
}

/// The claims above mean something only if the oracle notices what is lost without a region.
#[test]
fn kills_under_load_lose_or_double_requests_of_a_front_end_without_a_region() {
    for packed in [false, true] {
        let mut options = Options::new(PROGRAM.into(), 200, packed);
        options.region = Region::None;
        options.patience = std::time::Duration::from_secs(5);

        let error = run(&options).unwrap_err().to_string();

        assert!(
            ["lost", "doubled", "bytes in the used entry", "stale", "torn"].iter().any(|kind| error.contains(kind)),
            "{error}"
        );
    }
}
