//! The head of the submission queue that a completion reports.

use super::*;

#[test]
fn an_impossible_submission_head_frees_no_entry() {
    let mut harness = QueueHarness::new(4);
    for tag in 0..3 {
        harness.read(tag).unwrap();
    }
    harness.queue.ring();
    let cids = [harness.fetch().cid, harness.fetch().cid, harness.fetch().cid];
    for (cid, sq_head) in cids.into_iter().zip([4, u16::MAX, 77]) {
        harness.post(CompletionEntry { cid, sq_head, sq_id: ID, ..CompletionEntry::new_zeroed() });
    }

    assert_eq!(harness.reap().len(), 3, "the commands themselves have completed");

    assert_eq!(harness.read(9), Err(Full), "no entry has been freed");
}

#[test]
fn a_head_beyond_the_doorbell_is_ignored() {
    let mut harness = QueueHarness::new(8);
    harness.read(1).unwrap();
    harness.queue.ring();
    harness.read(2).unwrap();
    let cid = harness.fetch().cid;

    harness.post(CompletionEntry { cid, sq_head: 2, sq_id: ID, ..CompletionEntry::new_zeroed() });

    assert_eq!(harness.reap(), [(1, Outcome::Success)]);
    for tag in 0..5 {
        harness.read(tag).unwrap();
    }
    harness.queue.ring();
    assert_eq!(harness.read(6), Err(Full), "entries 0 to 6 are in use");
}

#[test]
fn a_head_beyond_the_doorbell_is_ignored_after_a_possible_one() {
    let mut harness = QueueHarness::new(8);
    harness.read(1).unwrap();
    harness.read(2).unwrap();
    harness.queue.ring();
    let cids = [harness.fetch().cid, harness.fetch().cid];
    for (cid, sq_head) in cids.into_iter().zip([2, 3]) {
        harness.post(CompletionEntry { cid, sq_head, sq_id: ID, ..CompletionEntry::new_zeroed() });
    }

    assert_eq!(harness.reap().len(), 2, "the commands themselves have completed");

    for tag in 0..7 {
        harness.read(tag).unwrap();
    }
    assert_eq!(harness.read(9), Err(Full), "all entries but one are in use");
}
