//! Controllers that misbehave: stuck, fatal, gone, or not resettable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::rig::{Rig, nvme_options, run, small, span};
use crate::driver::nvme::{Nvme, NvmeError, NvmeErrorKind};
use crate::driver::{Command, Driver, Outcome};
use crate::emulated::{Commands, Effect, Fault, Medium, Options, Status};
use crate::hardware::{AddressSpace, DmaBuffer, MapError};
use crate::memory::Region;

const ONE_BLOCK: Command = Command::Read { block: 0, count: 1 };

fn kind(error: anyhow::Error) -> NvmeErrorKind {
    error.downcast::<NvmeError>().unwrap().kind
}

#[test]
fn a_controller_that_cannot_be_disabled_is_reset() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    rig.function.faults.stuck_ready.store(true, SeqCst);

    let mut queues = nvme.recover().unwrap();

    assert_eq!(rig.function.faults.resets.load(SeqCst), 1);
    assert_eq!(run(&mut *queues[1], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_controller_that_cannot_be_recovered_is_stopped() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    rig.function.faults.stuck_ready.store(true, SeqCst);
    rig.function.faults.reset_fails.store(true, SeqCst);

    let error = nvme.recover().err().unwrap();

    assert!(matches!(kind(error), NvmeErrorKind::StatusTimeout { condition: "CSTS.RDY = 0", .. }));
    rig.assert_stopped();
}

#[test]
fn a_controller_that_comes_back_can_be_recovered_after_a_failed_attempt() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(2);
    drop(queues);
    rig.function.faults.gone.store(true, SeqCst);
    assert!(matches!(kind(nvme.recover().err().unwrap()), NvmeErrorKind::Gone));
    rig.assert_stopped();

    rig.function.faults.gone.store(false, SeqCst);

    let mut queues = nvme.recover().unwrap();
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_fatal_controller_is_recovered_by_disabling_it() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.function.faults.fatal.store(true, SeqCst);
    let error = nvme.recover().err().unwrap();
    assert!(matches!(kind(error), NvmeErrorKind::Fatal(_)), "still fatal when enabled again");
    rig.assert_stopped();

    rig.function.faults.fatal.store(false, SeqCst);

    assert!(nvme.recover().is_ok());
}

#[test]
fn a_missing_controller_is_reported_as_gone_not_as_slow() {
    let rig = Rig::new(small());
    rig.function.faults.gone.store(true, SeqCst);

    let error = rig.bring_up(nvme_options(1)).err().unwrap();

    assert!(matches!(error.kind, NvmeErrorKind::Gone));
    rig.assert_stopped();
}

#[test]
fn the_memory_of_a_removed_controller_is_freed() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(4);
    drop(queues);
    rig.function.faults.gone.store(true, SeqCst);

    nvme.shut_down();

    rig.assert_stopped();
}

#[test]
fn memory_stays_mapped_while_dma_cannot_be_ruled_out() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    let mapped = rig.driver_memory();
    for fault in
        [&rig.function.faults.stuck_ready, &rig.function.faults.reset_fails, &rig.function.faults.bus_master_stays]
    {
        fault.store(true, SeqCst);
    }

    assert!(nvme.recover().is_err());
    drop(nvme);

    assert_eq!(rig.driver_memory(), mapped);
}

#[test]
fn a_disabled_controllers_memory_is_freed_even_if_bus_mastering_stays_on() {
    let rig = Rig::new(small());
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.function.faults.bus_master_stays.store(true, SeqCst);

    nvme.shut_down();

    assert_eq!(rig.driver_memory(), 0);
}

/// An address space that records whether it is released.
struct RecordingSpace {
    inner: Arc<dyn AddressSpace>,
    released: AtomicBool,
}

impl AddressSpace for RecordingSpace {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.inner.add(region)
    }
    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.inner.remove(region)
    }
    fn release(&self) {
        self.released.store(true, SeqCst);
    }
    fn is_released(&self) -> bool {
        self.released.load(SeqCst)
    }
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        self.inner.buffer(bytes)
    }
}

#[test]
fn a_reacquired_function_that_cannot_be_brought_up_is_released_again() {
    let rig = Rig::new(small());
    let space = Arc::new(RecordingSpace { inner: rig.machine.space(), released: AtomicBool::new(false) });
    let (function, reacquired_space) = (Arc::clone(&rig.function), Arc::clone(&space));
    let mut nvme =
        Nvme::bring_up(function.clone(), space.clone(), nvme_options(1)).unwrap().with_reacquire(Box::new(move || {
            reacquired_space.released.store(false, SeqCst);
            Ok(function.clone())
        }));
    drop(nvme.take_queues());
    nvme.release();
    assert!(space.is_released());
    rig.function.faults.gone.store(true, SeqCst);

    assert!(matches!(kind(nvme.recover().err().unwrap()), NvmeErrorKind::Gone));

    assert!(nvme.is_released() && space.is_released());
    rig.function.faults.gone.store(false, SeqCst);
    let mut queues = nvme.recover().unwrap();
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
    assert!(!space.is_released());
}

#[test]
fn endless_events_do_not_block_the_driver_and_are_ignored_until_the_next_reset() {
    const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    let rig = Rig::new(Options { medium: Medium::Null, ..small() });
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    let completed_at_once = Effect::Status(Status::SUCCESS);
    rig.machine.inject(Fault::always(Commands::admin(ASYNC_EVENT_REQUEST), completed_at_once));
    let mut queues = nvme.recover().unwrap();

    nvme.handle_events().unwrap();
    nvme.handle_events().unwrap();

    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
    rig.machine.clear_faults();
    drop(queues);
    nvme.recover().unwrap();
    let before = nvme.geometry().blocks;
    rig.machine.resize(before * 512 * 2).unwrap();
    nvme.handle_events().unwrap();
    assert_eq!(nvme.geometry().blocks, before * 2, "events are handled again");
}
