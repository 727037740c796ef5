//! What a No Snoop function and the CPUs see of each other's writes, with and without flushes.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::host::{Completion, Host, Pair, Sqe, small};
use crate::addr::{Iova, Span};
use crate::coherency::{Coherent, Facts, NoSnoop, NotOurs, Policy, Verdict, decide};
use crate::emulated::{Machine, Options};
use crate::hardware::{DmaBuffer, Function, InterruptKind, Registers};
use crate::vfio::no_snoop::{NoSnoopDisabled, probe};

const READ: u8 = 2;
const WRITE: u8 = 1;
const DEVICE_CONTROL: u16 = 0x58;
const NO_SNOOP: u16 = 1 << 11;

/// Options of a function that bypasses the caches.
fn non_coherent() -> Options {
    Options { no_snoop: true, snoop_enforced: false, ..small() }
}

/// A host that flushes its queues, and a data buffer that each test flushes itself.
struct Fixture {
    host: Host,
    pair: Pair,
    data: DmaBuffer,
}

impl Fixture {
    fn new(options: Options) -> Self {
        let mut host = Host::enabled(options);
        let pair = host.pair(1, [16; 2]);
        let data = host.buffer(4096);
        Self { host, pair, data }
    }

    fn run(&mut self, opcode: u8) -> Completion {
        self.host.run(&mut self.pair, Sqe::rw(opcode, 0, 1).prps(self.data.span().start(), Iova(0)))
    }

    fn flush(&self) {
        self.host.flush(&self.data, 0, 512);
    }

    /// The value of all 512 bytes as the CPUs see them. They must be equal.
    fn read_block(&self) -> u8 {
        let mut bytes = [0; 512];
        self.data.memory().copy_to(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{bytes:x?}");
        bytes[0]
    }

    fn fill(&self, value: u8) {
        self.data.memory().copy_from(0, &[value; 512]);
    }

    /// Writes `value` to the medium with the necessary flush.
    fn store(&mut self, value: u8) {
        self.fill(value);
        self.flush();
        assert_eq!(self.run(WRITE).status, 0);
    }

    /// Reads the medium with the necessary flushes.
    fn load(&mut self) -> u8 {
        self.flush();
        assert_eq!(self.run(READ).status, 0);
        self.flush();
        self.read_block()
    }
}

#[test]
fn with_all_flushes_data_is_correct() {
    let mut fixture = Fixture::new(non_coherent());
    for value in [1, 2] {
        fixture.store(value);
        fixture.fill(0xff);
        assert_eq!(fixture.load(), value);
    }
}

#[test]
fn a_write_without_a_flush_stores_old_data() {
    let mut fixture = Fixture::new(non_coherent());
    fixture.fill(1);

    fixture.run(WRITE);

    assert_eq!(fixture.load(), 0);
}

#[test]
fn a_read_without_a_flush_afterwards_returns_old_data() {
    let mut fixture = Fixture::new(non_coherent());
    fixture.store(1);
    fixture.fill(2);
    fixture.flush();

    fixture.run(READ);

    assert_eq!(fixture.read_block(), 2);
    fixture.flush();
    assert_eq!(fixture.read_block(), 1);
}

#[test]
fn a_read_into_dirty_lines_is_overwritten_by_them() {
    let mut fixture = Fixture::new(non_coherent());
    fixture.store(1);
    fixture.fill(2);

    fixture.run(READ);
    fixture.flush();

    assert_eq!(fixture.read_block(), 2, "the line was dirty while the function wrote to DRAM");
}

#[test]
fn a_cpu_write_to_the_same_line_overwrites_read_data() {
    let mut fixture = Fixture::new(non_coherent());
    fixture.store(1);
    fixture.fill(2);
    fixture.flush();

    fixture.run(READ);
    fixture.data.memory().write_u8(511, 3);
    fixture.flush();

    assert_eq!([447, 448, 510].map(|at| fixture.data.memory().read_u8(at)), [1, 2, 2]);
}

#[test]
fn memory_mapped_without_a_flush_has_stale_data() {
    let mut fixture = Fixture::new(non_coherent());
    let page = crate::sys::SharedMemory::of(Arc::new(vm_memory::MmapRegion::new(4096).unwrap()));
    let at = Span::new(Iova(0x1000), 4096).unwrap();
    page.copy_from(0, &[7; 512]);
    fixture.host.machine.iommu().map(at, page).unwrap();

    let done = fixture.host.run(&mut fixture.pair, Sqe::rw(WRITE, 0, 1).prps(at.start(), Iova(0)));

    assert_eq!(done.status, 0);
    assert_eq!(fixture.load(), 0xdb);
}

#[test]
fn without_a_flush_the_controller_fetches_an_old_entry() {
    let mut fixture = Fixture::new(non_coherent());
    let cache = fixture.host.cache.take();
    fixture.host.push(&mut fixture.pair, Sqe::rw(READ, 0, 1).prps(fixture.data.span().start(), Iova(0)));
    fixture.host.ring(&fixture.pair);
    fixture.host.cache = cache;

    // The memory was zero when it was last flushed. The controller finds a Flush command for namespace 0.
    let done = fixture.host.take(&mut fixture.pair).unwrap();

    assert_eq!((done.cid, done.status), (0, 0x00b));
    assert_eq!(fixture.host.machine.traffic().reads, 0);
}

#[test]
fn a_completion_is_not_visible_before_its_line_is_flushed() {
    let mut fixture = Fixture::new(non_coherent());
    fixture.host.push(&mut fixture.pair, Sqe::rw(READ, 0, 1).prps(fixture.data.span().start(), Iova(0)));
    fixture.host.ring(&fixture.pair);

    assert_eq!(fixture.pair.peek(), None);

    assert_eq!(fixture.host.take(&mut fixture.pair).unwrap().status, 0);
}

#[test]
fn no_flush_is_needed_if_snooping_is_enforced_or_enable_no_snoop_is_clear() {
    let with_bit_cleared = |fixture: Fixture| {
        fixture.host.function.config_write(DEVICE_CONTROL, &0_u16.to_le_bytes()).unwrap();
        fixture
    };
    for mut fixture in [
        Fixture::new(Options { snoop_enforced: true, ..non_coherent() }),
        Fixture::new(Options { no_snoop: false, ..non_coherent() }),
        with_bit_cleared(Fixture::new(non_coherent())),
    ] {
        fixture.host.cache = None;
        for value in [1, 2] {
            fixture.fill(value);
            fixture.run(WRITE);
            fixture.fill(0xff);
            fixture.run(READ);
            assert_eq!(fixture.read_block(), value);
        }
    }
}

fn control(function: &dyn Function) -> u16 {
    let mut bytes = [0; 2];
    function.config_read(DEVICE_CONTROL, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

#[test]
fn enable_no_snoop_is_set_at_power_on_and_after_a_reset_unless_hardwired() {
    for (no_snoop, bit, found) in [(false, 0, NoSnoop::NeverSet), (true, NO_SNOOP, NoSnoop::Controllable)] {
        let function = Machine::new(Options { no_snoop, ..small() }).unwrap().function();
        assert_eq!(control(&*function) & NO_SNOOP, bit);
        assert_eq!(probe(&*function, Some(false)).unwrap(), found);
        function.config_write(DEVICE_CONTROL, &0_u16.to_le_bytes()).unwrap();
        assert_eq!(control(&*function) & NO_SNOOP, 0);
        function.reset().unwrap();
        assert_eq!(control(&*function) & NO_SNOOP, bit);
    }
}

/// Modifies the bytes of a configuration space read; the first argument is the offset.
type PatchRead = dyn Fn(u16, &mut [u8]) + Send + Sync;

/// A function with modified configuration space reads.
struct PatchedConfig {
    inner: Arc<dyn Function>,
    patch: Box<PatchRead>,
}

impl Function for PatchedConfig {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.config_read(offset, bytes)?;
        (self.patch)(offset, bytes);
        Ok(())
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.inner.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.inner.registers(bar)
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.inner.vectors(kind)
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.inner.route_vectors(kind, events)
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.inner.set_bus_master(on)
    }
    fn reset(&self) -> io::Result<()> {
        self.inner.reset()
    }
}

fn patched_config(patch: impl Fn(u16, &mut [u8]) + Send + Sync + 'static) -> Arc<PatchedConfig> {
    Arc::new(PatchedConfig { inner: Machine::new(non_coherent()).unwrap().function(), patch: Box::new(patch) })
}

/// A function whose Enable No Snoop reads as 1, whatever is written, while `stuck` is true.
fn with_stuck_bit(stuck: &Arc<AtomicBool>) -> Arc<PatchedConfig> {
    let stuck = Arc::clone(stuck);
    patched_config(move |offset, bytes| {
        if offset == DEVICE_CONTROL && stuck.load(SeqCst) {
            bytes[1] |= 8;
        }
    })
}

#[test]
fn a_function_whose_enable_no_snoop_means_nothing_is_not_ours() {
    let why = |function: &dyn Function, virtual_function| match probe(function, virtual_function).unwrap() {
        NoSnoop::NotOurs(why) => why,
        other => panic!("{other}"),
    };
    let graphics = patched_config(|offset, bytes| match offset {
        0 => bytes.copy_from_slice(&0x8086_u16.to_le_bytes()),
        0x0b => bytes[0] = 3,
        _ => {}
    });
    let conventional = patched_config(|offset, bytes| {
        if offset == 6 {
            bytes[0] &= !0x10;
        }
    });

    assert_eq!(why(&*patched_config(|_, _| {}), Some(true)), NotOurs::VirtualFunction);
    assert_eq!(why(&*graphics, Some(false)), NotOurs::IntegratedGraphics);
    assert_eq!(why(&*conventional, Some(false)), NotOurs::NoCapability);
}

/// The emulated function has no interrupt pin with these options, as virtual functions have none.
#[test]
fn a_bit_that_reads_zero_proves_nothing_of_a_function_that_may_be_virtual() {
    let pin = |pin: u8| {
        patched_config(move |offset, bytes| match offset {
            0x3d => bytes[0] = pin,
            // The bit stays clear.
            DEVICE_CONTROL => bytes[1] &= !8,
            _ => {}
        })
    };
    assert_eq!(probe(&*pin(0), None).unwrap(), NoSnoop::NotOurs(NotOurs::MaybeVirtualFunction));
    assert_eq!(probe(&*pin(1), None).unwrap(), NoSnoop::NeverSet, "it has a pin");
    assert_eq!(probe(&*pin(0), Some(false)).unwrap(), NoSnoop::NeverSet, "sysfs tells");
}

#[test]
fn enable_no_snoop_is_not_probed_while_bus_master_is_on() {
    let function = Machine::new(non_coherent()).unwrap().function();
    function.set_bus_master(true).unwrap();
    assert_eq!(probe(&*function, Some(false)).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
}

fn bus_master(function: &dyn Function) -> bool {
    let mut bytes = [0; 2];
    function.config_read(4, &mut bytes).unwrap();
    bytes[0] & 4 != 0
}

#[test]
fn disabled_no_snoop_is_clear_whenever_bus_master_is_on() {
    let machine = Machine::new(non_coherent()).unwrap();
    let function = NoSnoopDisabled::new(machine.function()).unwrap().unwrap();
    for _ in 0..2 {
        machine.function().config_write(DEVICE_CONTROL, &NO_SNOOP.to_le_bytes()).unwrap();
        function.set_bus_master(true).unwrap();
        assert_eq!(control(&function) & NO_SNOOP, 0);
    }
}

#[test]
fn disabled_no_snoop_is_clear_after_a_reset() {
    let machine = Machine::new(non_coherent()).unwrap();
    let function = NoSnoopDisabled::new(machine.function()).unwrap().unwrap();
    function.reset().unwrap();
    assert_eq!(control(&function) & NO_SNOOP, 0);
}

#[test]
fn a_function_whose_no_snoop_becomes_stuck_gets_no_bus_master() {
    let stuck = Arc::default();
    let inner = with_stuck_bit(&stuck);
    let function = NoSnoopDisabled::new(Arc::clone(&inner) as Arc<dyn Function>).unwrap().unwrap();
    function.set_bus_master(true).unwrap();
    function.set_bus_master(false).unwrap();
    stuck.store(true, SeqCst);

    let after_reset = function.reset().unwrap_err();
    let error = function.set_bus_master(true).unwrap_err();

    for error in [after_reset, error] {
        assert!(error.to_string().contains("--no-snoop=assume"), "{error}");
    }
    assert!(!bus_master(&*inner));
}

#[test]
fn a_stuck_no_snoop_changes_the_verdict_to_flush() {
    let function = with_stuck_bit(&Arc::new(AtomicBool::new(true)));
    let no_snoop = probe(&*function, Some(false)).unwrap();
    assert_eq!(no_snoop, NoSnoop::NotOurs(NotOurs::StaysSet));

    let facts = Facts { no_snoop, ..Machine::new(non_coherent()).unwrap().facts(Policy::Suppress).unwrap() };

    assert!(matches!(decide(&facts), Verdict::Flush(_)));
    assert!(NoSnoopDisabled::new(function).unwrap().is_none());
}

#[test]
fn probing_enable_no_snoop_restores_it() {
    for before in [0, NO_SNOOP] {
        let function = Machine::new(non_coherent()).unwrap().function();
        function.config_write(DEVICE_CONTROL, &before.to_le_bytes()).unwrap();
        assert_eq!(probe(&*function, Some(false)).unwrap(), NoSnoop::Controllable);
        assert_eq!(control(&*function) & NO_SNOOP, before);
    }
}

#[test]
fn the_facts_match_the_options() {
    let verdict = |options: Options, policy| decide(&Machine::new(options).unwrap().facts(policy).unwrap());
    let held = Verdict::Coherent(Coherent::Disabled { mask_guest_writes: false });
    assert_eq!(verdict(small(), Policy::Allow), Verdict::Coherent(Coherent::Enforced));
    assert_eq!(
        verdict(Options { no_snoop: false, ..non_coherent() }, Policy::Allow),
        Verdict::Coherent(Coherent::NeverSet)
    );
    assert_eq!(verdict(non_coherent(), Policy::Suppress), held);
    assert!(matches!(verdict(non_coherent(), Policy::Allow), Verdict::Flush(_)));
    assert!(matches!(verdict(non_coherent(), Policy::Refuse), Verdict::Refuse(_)));
}
