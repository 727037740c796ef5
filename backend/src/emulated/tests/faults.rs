//! The effect of each fault on the host.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::host::{CC, CC_ON, CSTS, Host, Pair, Sqe, small, threaded};
use crate::addr::Iova;
use crate::emulated::{Commands, Effect, Fault, Options, Order, Status};
use crate::hardware::DmaBuffer;
use crate::hardware::InterruptKind;

const READ: u8 = 2;

fn reads() -> Commands {
    Commands { queue: Some(1), opcode: Some(READ) }
}

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

    /// Submits a read of block 0 and returns its identifier.
    fn read(&mut self) -> u16 {
        let cid = self.host.push(&mut self.pair, Sqe::rw(READ, 0, 1).prps(self.data.span().start(), Iova(0)));
        self.host.ring(&self.pair);
        cid
    }

    /// Identifier and status of all completed commands.
    fn reap(&mut self) -> Vec<(u16, u16)> {
        let mut done = Vec::new();
        while let Some(one) = self.host.take(&mut self.pair) {
            done.push((one.cid, one.status));
        }
        done
    }
}

#[test]
fn only_the_nth_matching_command_is_affected() {
    let mut fixture = Fixture::new(small());
    let effect = Effect::Status(Status::new(2, 0x81));
    fixture.host.machine.inject(Fault::Command { on: reads(), skip: 2, times: 1, effect });

    for _ in 0..4 {
        fixture.read();
    }
    let flush = fixture.host.push(&mut fixture.pair, Sqe::new(0).nsid(1));
    fixture.host.ring(&fixture.pair);

    assert_eq!(fixture.reap(), [(0, 0), (1, 0), (2, 0x281), (3, 0), (flush, 0)]);
    assert_eq!(fixture.host.machine.traffic().reads, 3, "a failed command is not executed");
}

#[test]
fn completions_are_lost_duplicated_or_posted_with_a_wrong_id_or_phase() {
    for (effect, expected) in [
        (Effect::Lose, vec![(1, 0)]),
        (Effect::Twice, vec![(0, 0), (0, 0), (1, 0)]),
        (Effect::WrongId(77), vec![(77, 0), (1, 0)]),
        (Effect::WrongPhase, vec![]),
    ] {
        let mut fixture = Fixture::new(small());
        fixture.host.machine.inject(Fault::once(reads(), effect));

        fixture.read();
        fixture.read();

        assert_eq!(fixture.reap(), expected, "{effect:?}");
        assert_eq!(fixture.host.machine.traffic().reads, 2, "{effect:?}: the data was transferred");
    }
}

#[test]
fn a_delayed_command_accesses_memory_only_when_due() {
    let mut fixture = Fixture::new(small());
    fixture.data.memory().write_u8(0, 7);
    fixture.host.machine.inject(Fault::once(reads(), Effect::Delay(Duration::from_secs(3))));

    fixture.read();
    fixture.read();
    fixture.data.memory().write_u8(0, 8);
    let before = fixture.reap();
    fixture.host.machine.advance(Duration::from_millis(2999));
    let early = (fixture.reap(), fixture.data.memory().read_u8(0));
    fixture.host.machine.advance(Duration::from_millis(1));

    assert_eq!(before, [(1, 0)]);
    assert_eq!(early, (vec![], 8));
    assert_eq!((fixture.reap(), fixture.data.memory().read_u8(0)), (vec![(0, 0)], 0));
}

#[test]
fn unmapping_memory_of_a_command_in_flight_causes_a_fault() {
    let mut fixture = Fixture::new(Options { latency: Duration::from_millis(1), ..small() });
    fixture.read();
    let unmapped = fixture.data.span().start();
    fixture.data = fixture.host.buffer(8192);

    fixture.host.machine.advance(Duration::from_millis(1));

    assert_eq!(fixture.reap(), [(0, 0x004)]);
    assert_eq!(fixture.host.machine.iommu().faults()[0].iova, unmapped);
}

#[test]
fn abort_and_queue_deletion_abort_commands_in_flight() {
    let mut fixture = Fixture::new(Options { latency: Duration::from_secs(1), ..small() });
    let cids: Vec<_> = (0..3).map(|_| fixture.read()).collect();

    let abort = fixture.host.admin(Sqe::new(8).dword(10, u32::from(cids[1]) << 16 | 1));
    let unknown = fixture.host.admin(Sqe::new(8).dword(10, 99 << 16 | 1));
    let aborted = fixture.reap();
    let deleted = fixture.host.admin(Sqe::new(0).dword(10, 1));
    fixture.host.machine.advance(Duration::from_secs(2));

    assert_eq!((abort.result & 1, unknown.result & 1, deleted.status), (0, 1, 0));
    assert_eq!(aborted, [(1, 0x007)]);
    assert_eq!(fixture.reap(), [(0, 0x008), (2, 0x008)]);
    assert_eq!(fixture.host.machine.traffic().reads, 0);
}

#[test]
fn in_random_order_all_commands_complete_within_twice_the_latency_but_not_as_fetched() {
    let latency = Duration::from_millis(1);
    let order = Order::Random { seed: 1 };
    let mut fixture = Fixture::new(Options { latency, order, ..small() });
    let fetched: Vec<_> = (0..12).map(|_| (fixture.read(), 0)).collect();
    fixture.host.machine.advance(latency);
    let early = fixture.reap();

    fixture.host.machine.advance(latency);

    let mut completed = [early.clone(), fixture.reap()].concat();
    assert!(!early.is_empty() && early.len() < 12, "{early:?}");
    assert_ne!(completed, fetched);
    completed.sort_unstable();
    assert_eq!(completed, fetched);
}

#[test]
fn a_threaded_controller_completes_after_its_latency() {
    let mut fixture = Fixture::new(Options { latency: Duration::from_millis(2), ..threaded() });
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    fixture.host.function.route_vectors(InterruptKind::MsiX, &[event.as_fd(), event.as_fd()]).unwrap();

    fixture.read();
    rustix::io::read(&event, &mut [0; 8]).unwrap();

    assert_eq!(fixture.reap(), [(0, 0)]);
}

#[test]
fn a_lost_interrupt_does_not_lose_the_completion() {
    let mut fixture = Fixture::new(small());
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    fixture.host.function.route_vectors(InterruptKind::MsiX, &[event.as_fd(), event.as_fd()]).unwrap();
    fixture.host.machine.inject(Fault::once(reads(), Effect::LoseInterrupt));

    fixture.read();

    assert!(rustix::io::read(&event, &mut [0; 8]).is_err());
    assert_eq!(fixture.reap(), [(0, 0)]);
}

#[test]
fn a_fatal_status_stops_the_controller_until_it_is_reset() {
    let mut fixture = Fixture::new(small());
    fixture.host.machine.inject(Fault::once(reads(), Effect::Fatal));

    fixture.read();
    fixture.read();
    let (done, csts) = (fixture.reap(), fixture.host.bar.read32(CSTS));
    fixture.host.bar.write32(CC, 0);
    let reset = fixture.host.bar.read32(CSTS);
    fixture.host.enable();

    assert_eq!((done, csts, reset), (vec![], 0b11, 0));
}

#[test]
fn a_stuck_controller_ignores_cc_enable() {
    let mut fixture = Fixture::new(small());
    fixture.host.machine.inject(Fault::StuckReady);

    fixture.host.bar.write32(CC, CC_ON & !1);
    let stopping = fixture.host.bar.read32(CSTS);
    fixture.host.function.reset().unwrap();
    fixture.host.bar.write32(CC, CC_ON);
    let starting = fixture.host.bar.read32(CSTS);
    fixture.host.bar.write32(CC, 0);
    fixture.host.machine.clear_faults();
    fixture.host.function.set_bus_master(true).unwrap();
    fixture.host.enable();

    assert_eq!((stopping, starting), (1, 0));
}

#[test]
fn a_refused_reset_changes_nothing() {
    let mut fixture = Fixture::new(small());
    fixture.host.machine.inject(Fault::ResetRefused);
    assert!(fixture.host.function.reset().is_err());
    fixture.read();
    assert_eq!(fixture.reap(), [(0, 0)]);
}

#[test]
fn a_removed_function_reads_as_all_ones_and_returns_in_power_on_state() {
    for fault in [Fault::Removed, Fault::once(reads(), Effect::Remove)] {
        let mut fixture = Fixture::new(small());
        fixture.host.machine.inject(fault);
        fixture.read();
        let mut id = [0; 4];
        fixture.host.function.config_read(0, &mut id).unwrap();

        assert_eq!((fixture.host.bar.read32(CSTS), fixture.host.bar.read64(0), id), (u32::MAX, u64::MAX, [0xff; 4]));
        assert_eq!(fixture.reap(), []);
        assert!(fixture.host.function.reset().is_err());
        fixture.host.machine.clear_faults();
        assert_eq!(fixture.host.bar.read32(CSTS), 0);
        fixture.host.function.set_bus_master(true).unwrap();
        fixture.host.enable();
    }
}

#[test]
fn faults_can_affect_admin_commands() {
    let mut host = Host::enabled(small());
    host.machine.inject(Fault::once(Commands::admin(6), Effect::Status(Status::INTERNAL_ERROR)));
    let page = host.buffer(4096);
    let identify = || Sqe::new(6).dword(10, 1).prps(page.span().start(), Iova(0));
    assert_eq!(host.admin(identify()).status, 0x006);
    assert_eq!(host.admin(identify()).status, 0);
}

#[test]
fn capability_and_identify_are_overridden_until_faults_are_cleared() {
    let mut host = Host::enabled(small());
    let actual = host.bar.read64(0);
    let page = host.buffer(4096);
    let identify = |cns| Sqe::new(6).nsid(1).dword(10, cns).prps(page.span().start(), Iova(0));
    host.machine.inject(Fault::Capability(u64::MAX));
    host.machine.inject(Fault::Identify { cns: 0, offset: 4094, bytes: vec![1, 2, 3] });

    host.admin(identify(0));
    let (overridden, bytes) = (host.bar.read64(0), page.memory().read_u16(4094));
    host.admin(identify(1));
    let other = page.memory().read_u16(4094);
    host.machine.clear_faults();
    host.admin(identify(0));

    assert_eq!((overridden, bytes, other), (u64::MAX, 0x0201, 0));
    assert_eq!((host.bar.read64(0), page.memory().read_u16(4094)), (actual, 0));
}
