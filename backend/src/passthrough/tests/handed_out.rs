//! A function whose own file was handed out, and memory that an assignment has left mapped.

use std::sync::atomic::AtomicBool;

use anyhow::anyhow;

use super::*;
use crate::coherency::NoSnoop;
use crate::emulated::EmulatedCdev;

/// A passthrough of the function behind `cdev`. `change` is applied to the facts when it is reacquired.
fn passthrough_of(
    machine: &Machine,
    cdev: &Arc<EmulatedCdev>,
    bars: BarAccess,
    change: impl Fn(Facts) -> Facts + Send + Sync + 'static,
) -> Passthrough {
    let facts = Facts { personality: Personality::WholeFunction, ..machine.facts(Policy::Suppress).unwrap() };
    let device = Passthrough::new(cdev.bind().unwrap(), machine.space(), bars, facts, false).unwrap();
    let cdev = Arc::clone(cdev);
    device.with_reacquire(Box::new(move || {
        let function = cdev.bind().map_err(|error| ReacquireError::Held(anyhow!(error)))?;
        Ok(Reacquired { function, facts: change(facts) })
    }))
}

/// Has the file for BAR 0 handed out.
fn take_file(assignment: &mut Assignment<'_>) -> OwnedFd {
    assignment.regions.mmap(0).unwrap().expect("a file for BAR 0").file
}

fn cdev(machine: &Machine, own_file: bool) -> Arc<EmulatedCdev> {
    Arc::new(EmulatedCdev::new(machine.whole_function(), own_file))
}

#[test]
fn a_function_whose_own_file_was_handed_out_is_acquired_anew_before_it_is_assigned_again() {
    let machine = machine();
    let device = passthrough_of(&machine, &cdev(&machine, true), BarAccess::Direct, |facts| facts);
    let mut assignment = device.assign().unwrap();
    let file = take_file(&mut assignment);
    drop(assignment);
    // What the holder of the file can do: nobody hears the host's request any more.
    machine.whole_function().route_removal(event().as_fd()).unwrap();

    device.note_given_to(Some(77));
    let held = device.assign().err().expect("the file is held");
    drop(file);
    let assignment = device.assign().unwrap();

    assert_eq!(held.errno(), libc::EBUSY, "{held}");
    assert!(held.to_string().contains("given to process 77"), "{held}");
    machine.request_removal();
    assert!(signalled(&device.request), "the host's request is routed again");
    assert!(assignment.regions.info(0).size > 0, "and the function is open");
}

#[test]
fn a_function_is_closed_at_the_end_of_an_assignment_that_handed_its_own_file_out() {
    let machine = machine();
    let cdev = cdev(&machine, true);
    let device = passthrough_of(&machine, &cdev, BarAccess::Direct, |facts| facts);
    let mut assignment = device.assign().unwrap();
    let file = take_file(&mut assignment);

    drop(assignment);

    assert!(device.is_closed());
    assert!(cdev.bind().is_err(), "the file is the only one left, and it is open");
    drop(file);
    assert!(cdev.bind().is_ok(), "this process has closed its own");
}

#[test]
fn nothing_is_reacquired_after_trapped_bars_or_a_file_of_one_bar() {
    let machine = machine();
    for (own_file, bars) in [(true, BarAccess::Trapped), (false, BarAccess::Direct)] {
        let unexpected = |_| panic!("nothing is reacquired");
        let device = passthrough_of(&machine, &cdev(&machine, own_file), bars, unexpected);
        let mut assignment = device.assign().unwrap();
        let given = assignment.regions.mmap(0).unwrap();

        drop(assignment);

        assert_eq!(given.is_some(), bars == BarAccess::Direct);
        assert!(device.assign().is_ok());
    }
}

#[test]
fn a_verdict_that_differs_after_reacquiring_refuses_the_assignment() {
    let machine = machine();
    let cdev = cdev(&machine, true);
    let changed = |facts| Facts { no_snoop: NoSnoop::NeverSet, ..facts };
    let device = passthrough_of(&machine, &cdev, BarAccess::Direct, changed);
    let mut assignment = device.assign().unwrap();
    drop(take_file(&mut assignment));
    drop(assignment);

    let refused = device.assign().err().expect("the verdict has changed");

    assert_eq!(refused.errno(), libc::EPERM, "{refused}");
    assert!(refused.to_string().contains("its DMA was coherent: No Snoop is disabled and would now be"), "{refused}");
    assert!(device.is_closed() && cdev.bind().is_ok(), "the function is closed again");
}

/// An address space that fails to unmap while `stuck`.
struct Sticky {
    inner: Arc<dyn AddressSpace>,
    stuck: AtomicBool,
}

impl AddressSpace for Sticky {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.inner.add(region)
    }
    fn remove(&self, region: &Region) -> Result<(), MapError> {
        if !self.stuck.load(SeqCst) {
            return self.inner.remove(region);
        }
        let source = io::Error::from_raw_os_error(libc::EIO);
        Err(MapError::Kernel { step: "unmap", span: region.iova(), source })
    }
    fn statistics(&self) -> SpaceStatistics {
        self.inner.statistics()
    }
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        self.inner.buffer(bytes)
    }
}

#[test]
fn a_function_that_still_reaches_former_memory_is_assigned_to_nobody() {
    let machine = machine();
    let facts = Facts { personality: Personality::WholeFunction, ..machine.facts(Policy::Suppress).unwrap() };
    let space = Arc::new(Sticky { inner: machine.space(), stuck: AtomicBool::new(false) });
    let shared: Arc<dyn AddressSpace> = Arc::clone(&space) as _;
    let device = Passthrough::new(machine.whole_function(), shared, BarAccess::Direct, facts, false).unwrap();
    let mut assignment = device.assign().unwrap();
    assignment.maps.map(map(&memory(0x1000), 0x1000, 0x1000, true)).unwrap();
    space.stuck.store(true, SeqCst);
    drop(assignment);

    let refused = device.assign().err().expect("memory is still mapped");

    assert_eq!(refused.errno(), libc::EBUSY, "{refused}");
    assert!(refused.to_string().contains("4096 bytes of the previous virtual machine's memory"), "{refused}");
}
