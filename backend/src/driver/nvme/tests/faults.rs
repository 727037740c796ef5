//! Controllers that do not do as they should.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::rig::{Rig, run, small, span, wanted};
use crate::driver::nvme::{Cause, Nvme, NvmeError};
use crate::driver::{Command, Driver, Outcome};
use crate::hardware::{AddressSpace, DmaBuffer, MapError};
use crate::memory::Region;

const ONE_BLOCK: Command = Command::Read { block: 0, count: 1 };

fn cause(error: anyhow::Error) -> Cause {
    error.downcast::<NvmeError>().unwrap().cause
}

#[test]
fn a_controller_that_does_not_let_go_is_reset() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    rig.function.how.stuck_ready.store(true, SeqCst);

    let mut queues = nvme.recover().unwrap();

    assert_eq!(rig.function.how.resets.load(SeqCst), 1);
    assert_eq!(run(&mut *queues[1], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_controller_that_cannot_be_recovered_is_off() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    rig.function.how.stuck_ready.store(true, SeqCst);
    rig.function.how.reset_fails.store(true, SeqCst);

    let error = nvme.recover().err().unwrap();

    assert!(matches!(cause(error), Cause::NotReached { condition: "CSTS.RDY = 0", .. }));
    rig.assert_stopped();
}

#[test]
fn a_controller_that_comes_back_can_be_recovered_after_a_failed_attempt() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    rig.function.how.gone.store(true, SeqCst);
    assert!(matches!(cause(nvme.recover().err().unwrap()), Cause::Gone));
    rig.assert_stopped();

    rig.function.how.gone.store(false, SeqCst);

    let mut queues = nvme.recover().unwrap();
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_fatal_controller_is_recovered_by_disabling_it() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.function.how.fatal.store(true, SeqCst);
    let error = nvme.recover().err().unwrap();
    assert!(matches!(cause(error), Cause::Fatal(_)), "still fatal when enabled again");
    rig.assert_stopped();

    rig.function.how.fatal.store(false, SeqCst);

    assert!(nvme.recover().is_ok());
}

#[test]
fn a_controller_that_is_gone_is_told_from_one_that_is_slow() {
    let rig = Rig::new(small());
    rig.function.how.gone.store(true, SeqCst);

    let error = rig.bring_up(wanted(1)).err().unwrap();

    assert!(matches!(error.cause, Cause::Gone));
    rig.assert_stopped();
}

#[test]
fn a_controller_removed_at_work_is_given_up_and_its_memory_returned() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(4);
    drop(queues);
    rig.function.how.gone.store(true, SeqCst);

    nvme.shut_down();

    rig.assert_stopped();
}

#[test]
fn memory_that_may_still_be_written_stays_mapped() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    let mapped = rig.driver_memory();
    for fault in [&rig.function.how.stuck_ready, &rig.function.how.reset_fails, &rig.function.how.bus_master_stays] {
        fault.store(true, SeqCst);
    }

    assert!(nvme.recover().is_err());
    drop(nvme);

    assert_eq!(rig.driver_memory(), mapped);
}

#[test]
fn a_stopped_controller_gives_its_memory_back_though_bus_mastering_stays_on() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.function.how.bus_master_stays.store(true, SeqCst);

    nvme.shut_down();

    assert_eq!(rig.driver_memory(), 0);
}

/// An address space that can be parted from its function.
struct Parting {
    inner: Arc<dyn AddressSpace>,
    released_ranges: AtomicBool,
}

impl AddressSpace for Parting {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.inner.add(region)
    }
    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.inner.remove(region)
    }
    fn release(&self) {
        self.released_ranges.store(true, SeqCst);
    }
    fn is_released(&self) -> bool {
        self.released_ranges.load(SeqCst)
    }
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        self.inner.buffer(bytes)
    }
}

#[test]
fn a_function_that_returns_and_is_of_no_use_is_parted_from_again() {
    let rig = Rig::new(small());
    let space = Arc::new(Parting { inner: rig.machine.space(), released_ranges: AtomicBool::new(false) });
    let (function, joined) = (Arc::clone(&rig.function), Arc::clone(&space));
    let mut nvme = Nvme::bring_up(function.clone(), space.clone(), wanted(1)).unwrap().returning(Box::new(move || {
        joined.released_ranges.store(false, SeqCst);
        Ok(function.clone())
    }));
    drop(nvme.take_queues());
    nvme.release();
    assert!(space.is_released());
    rig.function.how.gone.store(true, SeqCst);

    assert!(matches!(cause(nvme.recover().err().unwrap()), Cause::Gone));

    assert!(nvme.is_released() && space.is_released());
    rig.function.how.gone.store(false, SeqCst);
    let mut queues = nvme.recover().unwrap();
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
    assert!(!space.is_released());
}
