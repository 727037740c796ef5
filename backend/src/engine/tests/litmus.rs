//! The two places where each side stores and then loads what the other has stored: kicks and calls. Without a full fence on both
//! sides each can miss the other's store, on x86 as well. Two threads do nothing else, many times, because a request does so much
//! more that the window is hardly ever hit. Without one of the four fences in `virtqueue/` these tests fail within a few hundred
//! rounds, if the threads have a processor each.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use super::packed_driver::{DISABLE, ENABLE, PackedDriver};
use super::rig::*;
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::Virtqueue;
use crate::engine::virtqueue::chain::Chain;
use crate::memory::MemTable;
use crate::sys::SharedMemory;

const ROUNDS: usize = 2_000;

/// What a driver does in a round.
trait Driver: Send {
    /// Makes a chain available. True if a kick is wanted.
    fn offer(&mut self) -> bool;
    /// Turns calls on. True if there is a used chain.
    fn wait_for_call(&mut self) -> bool;
    /// Takes what is used, and turns calls off.
    fn finish(&mut self);
}

impl Driver for SplitDriver {
    fn offer(&mut self) -> bool {
        let head = self.link(&[(DATA, 512, WRITE)]);
        SplitDriver::offer(self, head);
        fence(Ordering::SeqCst);
        self.used_flags() & 1 == 0
    }
    fn wait_for_call(&mut self) -> bool {
        self.set_avail_flags(0);
        fence(Ordering::SeqCst);
        self.used_idx() == self.avail_idx
    }
    fn finish(&mut self) {
        self.wait(1);
        self.set_avail_flags(1);
    }
}

impl Driver for PackedDriver {
    fn offer(&mut self) -> bool {
        self.offer_linked(&[(DATA, 512, WRITE)], None);
        fence(Ordering::SeqCst);
        self.device_event().1 != DISABLE
    }
    fn wait_for_call(&mut self) -> bool {
        self.set_driver_event(0, ENABLE);
        fence(Ordering::SeqCst);
        self.sees_used()
    }
    fn finish(&mut self) {
        self.wait(1);
        self.set_driver_event(0, DISABLE);
    }
}

/// Where both threads wait for each other, so that what comes next happens at the same time.
#[derive(Default)]
struct Meeting(AtomicUsize);

impl Meeting {
    fn meet(&self, arrivals: &mut usize) {
        *arrivals += 2;
        self.0.fetch_add(1, Ordering::SeqCst);
        for spins in 0_u32.. {
            if self.0.load(Ordering::SeqCst) >= *arrivals {
                return;
            }
            // The other thread may have no processor.
            if spins > 1000 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// Rounds in which nobody saw the other's store, for the kick and for the call.
fn lost(mut driver: impl Driver, mut ring: Virtqueue, mut guest: GuestMemoryView) -> (usize, usize) {
    let (meeting, kicks, calls) = (Meeting::default(), AtomicUsize::new(0), AtomicUsize::new(0));
    let saw = |by: &AtomicUsize, seen| _ = by.fetch_add(usize::from(seen), Ordering::SeqCst);
    let (mut lost_kicks, mut lost_calls) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut arrivals = 0;
            for _ in 0..ROUNDS {
                meeting.meet(&mut arrivals);
                saw(&kicks, driver.offer());
                meeting.meet(&mut arrivals);
                meeting.meet(&mut arrivals);
                saw(&calls, driver.wait_for_call());
                meeting.meet(&mut arrivals);
                driver.finish();
            }
        });
        let (mut arrivals, mut chain) = (0, Chain::default());
        for _ in 0..ROUNDS {
            ring.disarm();
            meeting.meet(&mut arrivals);
            ring.arm();
            saw(&kicks, ring.available().unwrap() != 0);
            meeting.meet(&mut arrivals);
            lost_kicks += usize::from(kicks.swap(0, Ordering::SeqCst) == 0);
            assert!(ring.take(&mut guest, &mut chain).unwrap());
            ring.push_used(chain.head(), 512);
            meeting.meet(&mut arrivals);
            saw(&calls, ring.publish());
            meeting.meet(&mut arrivals);
            lost_calls += usize::from(calls.swap(0, Ordering::SeqCst) == 0);
        }
    });
    (lost_kicks, lost_calls)
}

fn memory() -> (SharedMemory, Arc<MemTable>, GuestMemoryView) {
    let region = region(BASE, LEN);
    let table = Arc::new(MemTable::new(vec![Arc::clone(&region)]).unwrap());
    let mut guest = GuestMemoryView::default();
    guest.publish(Arc::clone(&table));
    (region.memory().clone(), table, guest)
}

#[test]
fn no_kick_and_no_call_of_a_split_ring_is_lost() {
    let (memory, table, guest) = memory();
    let (driver, setup) = SplitDriver::new(memory, 0, RingOptions::default());
    driver.set_avail_flags(1);
    let ring = Virtqueue::new(&setup, &table).unwrap();

    assert_eq!(lost(driver, ring, guest), (0, 0));
}

#[test]
fn no_kick_and_no_call_of_a_packed_ring_is_lost() {
    let (memory, table, guest) = memory();
    let (driver, setup) = PackedDriver::new(memory, 0, RingOptions::default());
    driver.set_driver_event(0, DISABLE);
    let ring = Virtqueue::new(&setup, &table).unwrap();

    assert_eq!(lost(driver, ring, guest), (0, 0));
}
