//! Zone Append through a queue.

use super::*;

#[test]
fn an_append_returns_all_64_bits_of_its_block() {
    let mut harness = QueueHarness::new(4);
    let buffer = [Span::new(Iova(0x9000), 1024).unwrap()];
    harness.queue.submit(Command::ZoneAppend { block: 1 << 40, count: 2 }, &buffer, 0, 1024, 7).unwrap();
    let entry = harness.fetch();
    assert_eq!((entry.opcode, entry.cdw10, entry.cdw11, entry.cdw12, entry.prp1), (0x7d, 0, 1 << 8, 1, 0x9000));

    harness.post(CompletionEntry { result: 5, dw1: 1 << 8, sq_head: 1, sq_id: ID, cid: entry.cid, status: 0 });

    let mut done = Vec::new();
    harness.queue.reap(&mut |completion| done.push(completion));
    assert_eq!(done, [Completion { tag: 7, outcome: Outcome::Success, result: 1 << 40 | 5 }]);
}
