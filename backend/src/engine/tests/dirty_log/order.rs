//! A front-end that takes the marks at every moment: before each store to shared memory it clears the log and copies the pages
//! that it names. In the end its copy equals the ring. So a mark that comes before its write and not after it shows, and so does
//! a used entry that is visible before its page is marked.

use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use super::Log;
use crate::addr::{Gpa, Span};
use crate::engine::statistics::Counters;
use crate::engine::tests::bare::{region, setup};
use crate::engine::tests::rig::RingOptions;
use crate::engine::virtqueue::chain::Head;
use crate::engine::vring::Vring;
use crate::engine::{Layout, VringSetup};
use crate::memory::{LOG_PAGE, MemTable};
use crate::sys::{Poller, SharedMemory, before_each_store};

const BYTES: usize = 0xa000;
const DESC: u64 = 0;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x6000;

/// A ring of four, each part in a page.
const SMALL: RingOptions = RingOptions { size: 4, event_idx: false, base: 2 };

/// The copy, and the log.
struct FrontEnd {
    memory: SharedMemory,
    copy: Vec<u8>,
    log: Log,
}

impl FrontEnd {
    fn round(&mut self) {
        for page in self.log.take() {
            let at = page as usize;
            self.memory.copy_to(at, &mut self.copy[at..at + LOG_PAGE as usize]);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        self.memory.copy_to(0, &mut bytes);
        bytes
    }
}

/// Three used entries, which wrap around, in two publications. `each_store` is called before each store.
fn publish_some(
    layout: Layout,
    (options, used): (RingOptions, u64),
    each_store: impl Fn(&mut FrontEnd) + 'static,
) -> FrontEnd {
    let RingOptions { size, event_idx, base } = options;
    let (region, _file) = region(BYTES as u64);
    let memory = region.memory().clone();
    let table = MemTable::new(vec![Arc::new(region)]).unwrap();
    let (poller, counters) = (Poller::new().unwrap(), Counters::default());
    let log = Log::new();
    let logging = log.logging.clone();
    memory.write_u16(used as usize + 2, base);
    let part = |start, end: u64| Span::new(Gpa(start), end - start).unwrap();
    let (desc, avail) = (part(DESC, AVAIL), part(AVAIL, USED));
    let mut setup =
        VringSetup { desc, avail, used: part(used, BYTES as u64), ..setup(layout, size, [DESC, AVAIL, USED]) };
    (setup.used_log, setup.event_idx) = (Some(Gpa(used)), event_idx);
    // All requests have been taken. A packed ring's positions are a round apart.
    setup.base = if layout == Layout::Split {
        u32::from(base + size)
    } else {
        0x8000_0000 | u32::from(base) << 16 | u32::from(base)
    };
    let mut ring = Vring::start(setup, &table, &poller, 0).unwrap();
    let shared = Rc::new(RefCell::new(FrontEnd { copy: vec![0; BYTES], memory, log }));
    let (watched, copied) = (Rc::clone(&shared), Rc::clone(&shared));
    let process = || {
        ring.follow_log(Some(&logging));
        for id in 0..3 {
            ring.queue.push_used(Head::new(id, u16::from(layout == Layout::Packed)), 1);
            if id != 1 {
                copied.borrow_mut().round();
                ring.publish_logged(&counters, &logging).unwrap();
            }
            ring.queue.arm();
            ring.queue.disarm();
        }
        // A split ring is left with another avail_event than it had at the start.
        if layout == Layout::Split {
            ring.queue.arm();
        }
    };
    before_each_store(move || each_store(&mut watched.borrow_mut()), process);
    drop((ring, copied));
    Rc::into_inner(shared).expect("the watcher is gone").into_inner()
}

fn nothing_is_missed(layout: Layout, ring: (RingOptions, u64)) {
    let mut front_end = publish_some(layout, ring, FrontEnd::round);

    front_end.round();

    let memory = front_end.bytes();
    let missed = (0..BYTES).find(|at| front_end.copy[*at] != memory[*at]);
    assert_eq!(missed, None, "the first byte that was not copied");
    assert!(front_end.copy.iter().any(|byte| *byte != 0), "nothing was copied");
}

#[test]
fn a_front_end_that_copies_at_each_store_misses_nothing_of_a_split_ring() {
    nothing_is_missed(Layout::Split, (SMALL, USED));
}

#[test]
fn a_front_end_that_copies_at_each_store_misses_nothing_of_a_packed_ring() {
    nothing_is_missed(Layout::Packed, (SMALL, USED));
}

/// The index, the entries before the wrap, those after it and the avail event are each in another page.
#[test]
fn a_front_end_that_copies_at_each_store_misses_nothing_of_a_ring_across_pages() {
    let options = RingOptions { size: 1024, event_idx: true, base: 1022 };
    nothing_is_missed(Layout::Split, (options, 0x7000 - 4));
}

/// The front-end has cleared the log just before the publication. At the store that makes an entry visible, and after it, the page is
/// marked.
#[test]
fn the_page_of_a_used_entry_is_marked_before_the_entry_is_visible() {
    for layout in [Layout::Split, Layout::Packed] {
        // used.idx, or the flags of the first used descriptor.
        let word = if layout == Layout::Split { USED as usize + 2 } else { 2 * 16 + 14 };
        let seen = Rc::new(RefCell::new(Vec::new()));
        let record = Rc::clone(&seen);
        publish_some(layout, (SMALL, USED), move |front_end| {
            let mut byte = [0];
            front_end.log.file.read_exact_at(&mut byte, 0).unwrap();
            record.borrow_mut().push((front_end.memory.read_u16(word), byte[0]));
        });

        let seen = seen.borrow();
        let page = if layout == Layout::Split { 1 << (USED / LOG_PAGE) } else { 1 << (DESC / LOG_PAGE) };
        assert!(seen.windows(2).any(|pair| pair[0].0 != pair[1].0), "{layout}: nothing is published");
        for pair in seen.windows(2) {
            let [(before, marked), (after, _)] = pair else { unreachable!() };
            assert!(before == after || marked & page != 0, "{layout}: {seen:?}");
        }
    }
}
