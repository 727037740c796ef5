//! With arbitrary register writes and commands, the controller neither panics nor hangs, and works again after a reset.

use proptest::prelude::*;

use super::host::{Host, Sqe, small, threaded};
use crate::addr::Iova;
use crate::emulated::Options;

#[derive(Clone, Debug)]
enum Step {
    Register(usize, u32),
    Doorbell(usize, u32),
    Command { admin: bool, dwords: Vec<u32> },
    BusMaster(bool),
    Config(u16, Vec<u8>),
}

/// Meaningful values are more likely than others.
fn dword() -> impl Strategy<Value = u32> {
    prop_oneof![0..20_u32, any::<u32>(), Just(0x0001_0001), Just(0x000f_0001), Just(u32::MAX), Just(0xffff_0000)]
}

fn command() -> impl Strategy<Value = Step> {
    let opcode = prop_oneof![0..16_u32, 0..256_u32];
    (any::<bool>(), opcode, proptest::collection::vec(dword(), 16), 0..3_u32).prop_map(
        |(admin, opcode, mut dwords, at)| {
            dwords[0] = opcode;
            dwords[0] |= (dwords[15] & 0b11) << 14;
            dwords[1] = dwords[1].min(2);
            // The data buffer is at address 0, at the end of mapped memory, or anywhere.
            if at < 2 {
                (dwords[6], dwords[7], dwords[9]) = (at * 0xff00, 0, 0);
                dwords[8] &= 0xfff8;
            }
            Step::Command { admin, dwords }
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => command(),
        1 => (0..0x10_usize, dword()).prop_map(|(n, value)| Step::Register(n * 4, value)),
        2 => (0..16_usize, dword()).prop_map(|(n, value)| Step::Doorbell(n, value)),
        1 => any::<bool>().prop_map(Step::BusMaster),
        1 => (0..256_u16, proptest::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Step::Config(at, bytes)),
    ]
}

/// Performs `steps`, then checks that the controller works after a reset.
fn run_and_reset(options: Options, steps: &[Step]) {
    let mut host = Host::enabled(options);
    let guest = host.buffer(0x10000);
    host.machine.iommu().map(crate::addr::Span::new(Iova(0), 0x10000).unwrap(), guest.memory().clone()).unwrap();
    let mut pair = host.pair(1, [16; 2]);
    let mut admin = std::mem::replace(&mut host.admin, super::host::Pair::new(&*host.space, 0, [2; 2]));
    for step in steps {
        match step {
            Step::Register(offset, value) => host.bar.write32(*offset, *value),
            Step::Doorbell(n, value) => host.bar.write32(0x1000 + n * 4, *value),
            Step::BusMaster(on) => host.function.set_bus_master(*on).unwrap(),
            Step::Config(at, bytes) => host.function.config_write(*at, bytes).unwrap(),
            Step::Command { admin: to_admin, dwords } => {
                let queue = if *to_admin { &mut admin } else { &mut pair };
                let mut sqe = Sqe::new(0);
                for (n, dword) in dwords.iter().enumerate() {
                    sqe = sqe.dword(n, *dword);
                }
                host.push(queue, sqe);
                host.ring(queue);
                while host.take(queue).is_some() {}
            }
        }
    }
    host.function.reset().unwrap();
    host.function.set_bus_master(true).unwrap();
    host.enable();
    assert_eq!(host.admin(Sqe::new(10).dword(10, 7)).status, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn an_inline_controller_recovers_from_arbitrary_writes(steps in proptest::collection::vec(step(), 0..60)) {
        run_and_reset(Options { sgl: true, ..small() }, &steps);
    }

    #[test]
    fn a_threaded_controller_recovers_from_arbitrary_writes(steps in proptest::collection::vec(step(), 0..60)) {
        run_and_reset(threaded(), &steps);
    }
}
