//! A function that goes behind the caches: what it and the CPUs see of each other, with every flush and without one.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::host::{Done, Host, Pair, Sqe, small};
use crate::addr::{Iova, Span};
use crate::coherency::{Coherent, Facts, NoSnoop, NotOurs, Policy, Verdict, decide};
use crate::emulated::{Machine, Options};
use crate::hardware::{DmaBuffer, Function, Registers};
use crate::vfio::no_snoop::{NoSnoopDisabled, probe};

const READ: u8 = 2;
const WRITE: u8 = 1;
const DEVICE_CONTROL: u16 = 0x58;
const NO_SNOOP: u16 = 1 << 11;

fn behind() -> Options {
    Options { no_snoop: true, snoop_enforced: false, ..small() }
}

/// A host that flushes its queues, and one block of memory that it does not.
struct Bench {
    host: Host,
    pair: Pair,
    data: DmaBuffer,
}

impl Bench {
    fn new(options: Options) -> Self {
        let mut host = Host::up(options);
        let pair = host.pair(1, [16; 2]);
        let data = host.buffer(4096);
        Self { host, pair, data }
    }

    fn run(&mut self, opcode: u8) -> Done {
        self.host.run(&mut self.pair, Sqe::rw(opcode, 0, 1).prps(self.data.span().start(), Iova(0)))
    }

    fn flush(&self) {
        self.host.flush(&self.data, 0, 512);
    }

    /// All 512 bytes, which must be alike.
    fn seen(&self) -> u8 {
        let mut bytes = [0; 512];
        self.data.memory().copy_to(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{bytes:x?}");
        bytes[0]
    }

    fn fill(&self, value: u8) {
        self.data.memory().copy_from(0, &[value; 512]);
    }

    /// Puts `value` into the medium as a careful host does.
    fn store(&mut self, value: u8) {
        self.fill(value);
        self.flush();
        assert_eq!(self.run(WRITE).status, 0);
    }

    /// What the medium holds, read with everything flushed.
    fn stored(&mut self) -> u8 {
        self.flush();
        assert_eq!(self.run(READ).status, 0);
        self.flush();
        self.seen()
    }
}

#[test]
fn with_every_flush_data_are_right() {
    let mut bench = Bench::new(behind());
    for value in [1, 2] {
        bench.store(value);
        bench.fill(0xff);
        assert_eq!(bench.stored(), value);
    }
}

#[test]
fn a_write_without_a_flush_stores_what_was_there_before() {
    let mut bench = Bench::new(behind());
    bench.fill(1);

    bench.run(WRITE);

    assert_eq!(bench.stored(), 0);
}

#[test]
fn a_read_without_a_flush_after_it_shows_the_old_data() {
    let mut bench = Bench::new(behind());
    bench.store(1);
    bench.fill(2);
    bench.flush();

    bench.run(READ);

    assert_eq!(bench.seen(), 2);
    bench.flush();
    assert_eq!(bench.seen(), 1);
}

#[test]
fn a_read_into_lines_not_flushed_before_is_overwritten_by_them() {
    let mut bench = Bench::new(behind());
    bench.store(1);
    bench.fill(2);

    bench.run(READ);
    bench.flush();

    assert_eq!(bench.seen(), 2, "the line was dirty while the function wrote to DRAM");
}

#[test]
fn a_neighbour_in_the_same_line_is_as_bad() {
    let mut bench = Bench::new(behind());
    bench.store(1);
    bench.fill(2);
    bench.flush();

    bench.run(READ);
    bench.data.memory().write_u8(511, 3);
    bench.flush();

    assert_eq!([447, 448, 510].map(|at| bench.data.memory().read_u8(at)), [1, 2, 2]);
}

#[test]
fn memory_mapped_without_a_flush_shows_neither_side_the_other() {
    let mut bench = Bench::new(behind());
    let page = crate::sys::SharedMemory::of(Arc::new(vm_memory::MmapRegion::new(4096).unwrap()));
    let at = Span::new(Iova(0x1000), 4096).unwrap();
    page.copy_from(0, &[7; 512]);
    bench.host.machine.iommu().map(at, page).unwrap();

    let done = bench.host.run(&mut bench.pair, Sqe::rw(WRITE, 0, 1).prps(at.start(), Iova(0)));

    assert_eq!(done.status, 0);
    assert_eq!(bench.stored(), 0xdb);
}

#[test]
fn an_entry_that_was_not_flushed_is_not_the_one_that_runs() {
    let mut bench = Bench::new(behind());
    let cache = bench.host.cache.take();
    bench.host.push(&mut bench.pair, Sqe::rw(READ, 0, 1).prps(bench.data.span().start(), Iova(0)));
    bench.host.ring(&bench.pair);
    bench.host.cache = cache;

    // The memory was zero when it was flushed: the command found there is a Flush of no namespace.
    let done = bench.host.take(&mut bench.pair).unwrap();

    assert_eq!((done.cid, done.status), (0, 0x00b));
    assert_eq!(bench.host.machine.traffic().reads, 0);
}

#[test]
fn a_completion_is_not_seen_before_its_line_is_flushed() {
    let mut bench = Bench::new(behind());
    bench.host.push(&mut bench.pair, Sqe::rw(READ, 0, 1).prps(bench.data.span().start(), Iova(0)));
    bench.host.ring(&bench.pair);

    assert_eq!(bench.pair.peek(), None);

    assert_eq!(bench.host.take(&mut bench.pair).unwrap().status, 0);
}

#[test]
fn nothing_need_be_flushed_if_snooping_is_enforced_or_the_bit_is_clear_or_fixed() {
    let held = |bench: Bench| {
        bench.host.function.config_write(DEVICE_CONTROL, &0_u16.to_le_bytes()).unwrap();
        bench
    };
    for mut bench in [
        Bench::new(Options { snoop_enforced: true, ..behind() }),
        Bench::new(Options { no_snoop: false, ..behind() }),
        held(Bench::new(behind())),
    ] {
        bench.host.cache = None;
        for value in [1, 2] {
            bench.fill(value);
            bench.run(WRITE);
            bench.fill(0xff);
            bench.run(READ);
            assert_eq!(bench.seen(), value);
        }
    }
}

fn control(function: &dyn Function) -> u16 {
    let mut bytes = [0; 2];
    function.config_read(DEVICE_CONTROL, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

#[test]
fn the_bit_is_one_at_power_on_and_after_a_reset_if_it_exists_at_all() {
    for (no_snoop, bit, found) in [(false, 0, NoSnoop::NeverSet), (true, NO_SNOOP, NoSnoop::Controllable)] {
        let function = Machine::new(Options { no_snoop, ..small() }).unwrap().function();
        assert_eq!(control(&*function) & NO_SNOOP, bit);
        assert_eq!(probe(&*function, false).unwrap(), found);
        function.config_write(DEVICE_CONTROL, &0_u16.to_le_bytes()).unwrap();
        assert_eq!(control(&*function) & NO_SNOOP, 0);
        function.reset().unwrap();
        assert_eq!(control(&*function) & NO_SNOOP, bit);
    }
}

/// Given where a read begins, changes what was found there.
type Alter = dyn Fn(u16, &mut [u8]) + Send + Sync;

/// A function whose configuration space reads otherwise than it is.
struct Altered {
    inner: Arc<dyn Function>,
    alter: Box<Alter>,
}

impl Function for Altered {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.inner.config_read(offset, bytes)?;
        (self.alter)(offset, bytes);
        Ok(())
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.inner.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.inner.registers(bar)
    }
    fn vectors(&self) -> u16 {
        self.inner.vectors()
    }
    fn route_vectors(&self, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.inner.route_vectors(events)
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.inner.set_bus_master(on)
    }
    fn reset(&self) -> io::Result<()> {
        self.inner.reset()
    }
}

fn altered(alter: impl Fn(u16, &mut [u8]) + Send + Sync + 'static) -> Arc<Altered> {
    Arc::new(Altered { inner: Machine::new(behind()).unwrap().function(), alter: Box::new(alter) })
}

/// A function whose bit reads 1 whatever is written, once `comes_back`.
fn stubborn(comes_back: &Arc<AtomicBool>) -> Arc<Altered> {
    let comes_back = Arc::clone(comes_back);
    altered(move |offset, bytes| {
        if offset == DEVICE_CONTROL && comes_back.load(SeqCst) {
            bytes[1] |= 8;
        }
    })
}

#[test]
fn a_function_whose_bit_says_nothing_is_not_ours() {
    let why = |function: &dyn Function, virtual_function| match probe(function, virtual_function).unwrap() {
        NoSnoop::NotOurs(why) => why,
        other => panic!("{other}"),
    };
    let graphics = altered(|offset, bytes| match offset {
        0 => bytes.copy_from_slice(&0x8086_u16.to_le_bytes()),
        0x0b => bytes[0] = 3,
        _ => {}
    });
    let conventional = altered(|offset, bytes| {
        if offset == 6 {
            bytes[0] &= !0x10;
        }
    });

    assert_eq!(why(&*altered(|_, _| {}), true), NotOurs::VirtualFunction);
    assert_eq!(why(&*graphics, false), NotOurs::IntegratedGraphics);
    assert_eq!(why(&*conventional, false), NotOurs::NoCapability);
}

#[test]
fn the_bit_is_not_tried_while_the_function_may_do_dma() {
    let function = Machine::new(behind()).unwrap().function();
    function.set_bus_master(true).unwrap();
    assert_eq!(probe(&*function, false).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
}

fn bus_master(function: &dyn Function) -> bool {
    let mut bytes = [0; 2];
    function.config_read(4, &mut bytes).unwrap();
    bytes[0] & 4 != 0
}

#[test]
fn a_bit_held_off_is_clear_whenever_the_function_may_do_dma() {
    let machine = Machine::new(behind()).unwrap();
    let function = NoSnoopDisabled::new(machine.function()).unwrap().unwrap();
    for _ in 0..2 {
        machine.function().config_write(DEVICE_CONTROL, &NO_SNOOP.to_le_bytes()).unwrap();
        function.set_bus_master(true).unwrap();
        assert_eq!(control(&function) & NO_SNOOP, 0);
    }
}

#[test]
fn a_bit_held_off_is_clear_after_a_reset_too() {
    let machine = Machine::new(behind()).unwrap();
    let function = NoSnoopDisabled::new(machine.function()).unwrap().unwrap();
    function.reset().unwrap();
    assert_eq!(control(&function) & NO_SNOOP, 0);
}

#[test]
fn a_function_that_stops_obeying_gets_no_bus_master_any_more() {
    let comes_back = Arc::default();
    let stubborn = stubborn(&comes_back);
    let function = NoSnoopDisabled::new(Arc::clone(&stubborn) as Arc<dyn Function>).unwrap().unwrap();
    function.set_bus_master(true).unwrap();
    function.set_bus_master(false).unwrap();
    comes_back.store(true, SeqCst);

    let after_reset = function.reset().unwrap_err();
    let error = function.set_bus_master(true).unwrap_err();

    for error in [after_reset, error] {
        assert!(error.to_string().contains("--no-snoop=assume"), "{error}");
    }
    assert!(!bus_master(&*stubborn));
}

#[test]
fn a_bit_that_cannot_be_cleared_is_not_ours_and_turns_the_verdict() {
    let function = stubborn(&Arc::new(AtomicBool::new(true)));
    let no_snoop = probe(&*function, false).unwrap();
    assert_eq!(no_snoop, NoSnoop::NotOurs(NotOurs::StaysSet));

    let facts = Facts { no_snoop, ..Machine::new(behind()).unwrap().facts(Policy::Suppress).unwrap() };

    assert!(matches!(decide(&facts), Verdict::Flush(_)));
    assert!(NoSnoopDisabled::new(function).unwrap().is_none());
}

#[test]
fn trying_the_bit_leaves_it_as_it_was() {
    for before in [0, NO_SNOOP] {
        let function = Machine::new(behind()).unwrap().function();
        function.config_write(DEVICE_CONTROL, &before.to_le_bytes()).unwrap();
        assert_eq!(probe(&*function, false).unwrap(), NoSnoop::Controllable);
        assert_eq!(control(&*function) & NO_SNOOP, before);
    }
}

#[test]
fn the_facts_are_what_the_options_say() {
    let verdict = |options: Options, policy| decide(&Machine::new(options).unwrap().facts(policy).unwrap());
    let held = Verdict::Coherent(Coherent::Disabled { mask_guest_writes: false });
    assert_eq!(verdict(small(), Policy::Allow), Verdict::Coherent(Coherent::Enforced));
    assert_eq!(verdict(Options { no_snoop: false, ..behind() }, Policy::Allow), Verdict::Coherent(Coherent::NeverSet));
    assert_eq!(verdict(behind(), Policy::Suppress), held);
    assert!(matches!(verdict(behind(), Policy::Allow), Verdict::Flush(_)));
    assert!(matches!(verdict(behind(), Policy::Refuse), Verdict::Refuse(_)));
}
