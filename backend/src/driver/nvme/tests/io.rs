//! Data integrity: data written reads back unchanged, whatever the buffers' addresses.

use std::collections::HashMap;

use proptest::prelude::*;

use super::rig::{GUEST_BYTES, Rig, collect, nvme_options, offsets, run, small, span, transfer};
use crate::addr::Span;
use crate::driver::{Blocks, Command, DiscardLimits, Driver, Full, Outcome, Queue, ZeroesLimits};
use crate::emulated::{Commands, Effect, Fault, Mode, Options, Status};

/// A byte value derived from its offset.
fn pattern(offset: usize) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

fn fill(rig: &Rig, from: usize, len: usize) {
    for offset in from..from + len {
        rig.guest.write_u8(offset, pattern(offset));
    }
}

#[test]
fn the_geometry_is_that_of_the_drive() {
    for (lba, volatile_cache) in [(512, true), (4096, false)] {
        let rig = Rig::new(Options { lba, volatile_cache, serial: "SN 12".to_owned(), ..small() });

        let nvme = rig.bring_up(nvme_options(2)).unwrap();

        let geometry = nvme.geometry();
        assert_eq!((geometry.blocks, geometry.block_size), ((8 << 20) / u64::from(lba), lba));
        assert_eq!((geometry.physical_block_size, geometry.volatile_cache), (lba, volatile_cache));
        assert_eq!((geometry.serial.as_str(), geometry.read_only), ("SN 12", false));
        assert!(geometry.model.starts_with("vhost-device-vfio"));
    }
}

#[test]
fn contiguous_data_reads_back_with_commands_of_mdts_size() {
    for lba in [512, 4096] {
        let rig = Rig::new(Options { lba, mdts: 5, ..small() });
        let (_nvme, mut queues) = rig.up(1);
        fill(&rig, 0, 1 << 20);

        let written = transfer(&rig, &mut *queues[0], true, 3, &[span(0, 1 << 20)]);
        let read = transfer(&rig, &mut *queues[0], false, 3, &[span(2 << 20, 1 << 20)]);

        assert_eq!((written, read), ([8, 0], [8, 0]), "1 MiB in commands of 128 KiB, none bounced");
        assert!((0..1 << 20).all(|offset| rig.guest.read_u8((2 << 20) + offset) == pattern(offset)));
        assert_eq!(rig.machine.iommu().faults(), []);
    }
}

#[test]
fn without_mdts_one_command_transfers_a_mebibyte_at_any_dword() {
    let rig = Rig::new(Options { mdts: 0, ..small() });
    let (_nvme, mut queues) = rig.up(1);
    fill(&rig, 0xffc, 1 << 20);

    let written = transfer(&rig, &mut *queues[0], true, 0, &[span(0xffc, 1 << 20)]);
    let read = transfer(&rig, &mut *queues[0], false, 0, &[span(2 << 20, 1 << 20)]);

    assert_eq!((written, read), ([1, 0], [1, 0]));
    assert!((0..1 << 20).all(|offset| rig.guest.read_u8((2 << 20) + offset) == pattern(offset + 0xffc)));
}

#[test]
fn a_flush_succeeds_with_and_without_a_cache() {
    for volatile_cache in [true, false] {
        let rig = Rig::new(Options { volatile_cache, ..small() });
        let (_nvme, mut queues) = rig.up(1);
        assert_eq!(run(&mut *queues[0], Command::Flush, &[], 0), Outcome::Success);
        assert_eq!(rig.machine.traffic().flushes, 1);
    }
}

#[test]
fn a_failed_command_does_not_affect_others() {
    let rig = Rig::new(small());
    let (nvme, mut queues) = rig.up(1);
    let end = nvme.geometry().blocks;
    let queue = &mut *queues[0];
    for (tag, block) in [(1, end), (2, end - 1), (3, u64::MAX)] {
        queue.submit(Command::Read { block, count: 1 }, &[span(0, 512)], 0, 512, tag).unwrap();
    }
    queue.ring();

    let done: HashMap<_, _> = collect(queue, 3).into_iter().map(|done| (done.tag, done.outcome)).collect();

    assert_eq!(done, [(1, Outcome::Failed), (2, Outcome::Success), (3, Outcome::Failed)].into());
}

#[test]
fn queues_of_every_depth_wrap_many_times() {
    for queue_entries in [2, 3, 5, 64, 256, 1024] {
        let rig = Rig::new(Options { queue_entries, ..small() });
        let (_nvme, mut queues) = rig.up(1);
        let queue = &mut *queues[0];
        let most = usize::from(queue_entries.min(256)) - 1;
        let (mut sent, mut returned) = (0_u32, Vec::new());
        while sent < 5 * u32::from(queue_entries) {
            let block = u64::from(sent % 128);
            match queue.submit(Command::Read { block, count: 1 }, &[span(block * 512, 512)], 0, 512, sent) {
                Ok(()) => sent += 1,
                Err(Full) => {
                    assert_eq!(queue.in_flight(), most);
                    queue.ring();
                    returned.extend(collect(queue, 1));
                }
            }
        }
        queue.ring();
        let rest = queue.in_flight();
        returned.extend(collect(queue, rest));

        let mut tags: Vec<u32> = returned.iter().map(|done| done.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..sent).collect::<Vec<_>>());
        assert!(returned.iter().all(|done| done.outcome == Outcome::Success));
        assert_eq!(rig.machine.traffic().bad_doorbells, 0);
    }
}

#[test]
fn queues_on_several_threads_are_independent() {
    for doorbell_stride in [0, 3] {
        let rig = Rig::new(Options { mode: Mode::Threaded, doorbell_stride, ..small() });
        let (_nvme, queues) = rig.up(4);
        assert_eq!(queues.len(), 4);
        let share = GUEST_BYTES / 4;
        fill(&rig, 0, GUEST_BYTES);

        std::thread::scope(|scope| {
            for (n, mut queue) in queues.into_iter().enumerate() {
                let rig = &rig;
                scope.spawn(move || {
                    let (base, blocks) = (n * share, (share / 2 / 512) as u64);
                    let first = n as u64 * blocks;
                    let (from, to) =
                        (span(base as u64, share as u64 / 2), span((base + share / 2) as u64, share as u64 / 2));
                    transfer(rig, &mut *queue, true, first, &[from]);
                    transfer(rig, &mut *queue, false, first, &[to]);
                    for i in 0..share / 2 {
                        assert_eq!(rig.guest.read_u8(base + share / 2 + i), pattern(base + i), "queue {n}, byte {i}");
                    }
                });
            }
        });

        assert_eq!(rig.machine.traffic().bad_doorbells, 0);
    }
}

/// Disjoint buffers of any alignment; their total length is whole blocks.
fn scattered(block: u64) -> impl Strategy<Value = Vec<Span<crate::addr::Iova>>> {
    let gap = prop_oneof![3 => Just(0_u64), 2 => (0..16_u64).prop_map(|i| i * 512), 1 => 0..5000_u64];
    let len = prop_oneof![3 => Just(4096_u64), 2 => (1..20_u64).prop_map(|i| i * 512), 1 => 1..9000_u64];
    (0..4096_u64, prop::collection::vec((gap, len), 1..10)).prop_map(move |(mut at, pieces)| {
        let mut spans = Vec::new();
        let mut total = 0;
        for (gap, len) in pieces {
            spans.push(span(at + gap, len));
            at += gap + len;
            total += len;
        }
        if total % block != 0 {
            spans.push(span(at, block - total % block));
        }
        spans
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn scattered_data_reads_back((lba, buffers) in prop_oneof![Just(512_u32), Just(4096)]
        .prop_flat_map(|lba| (Just(lba), scattered(lba.into()))))
    {
        let rig = Rig::new(Options { lba, mdts: 2, ..small() });
        let (_nvme, mut queues) = rig.up(1);
        let total: u64 = buffers.iter().map(Span::len).sum();
        let offsets = offsets(&buffers, 0, total as u32);
        fill(&rig, 0, 1 << 20);

        transfer(&rig, &mut *queues[0], true, 1, &buffers);
        transfer(&rig, &mut *queues[0], false, 1, &[span(2 << 20, total)]);
        for (i, offset) in offsets.iter().enumerate() {
            prop_assert_eq!(rig.guest.read_u8((2 << 20) + i), pattern(*offset));
            rig.guest.write_u8(*offset, 0xee);
        }
        transfer(&rig, &mut *queues[0], false, 1, &buffers);

        for offset in 0..1 << 20 {
            prop_assert_eq!(rig.guest.read_u8(offset), pattern(offset), "byte {:#x} in or beside the buffers", offset);
        }
        prop_assert_eq!(rig.machine.iommu().faults(), []);
    }
}

/// The contents of `count` blocks from `block` on, read through `queue`.
fn on_medium(rig: &Rig, queue: &mut dyn Queue, block: u64, count: usize) -> Vec<u8> {
    let bytes = count * rig.lba as usize;
    transfer(rig, queue, false, block, &[span(1 << 20, bytes as u64)]);
    (0..bytes).map(|at| rig.guest.read_u8((1 << 20) + at)).collect()
}

#[test]
fn discarded_and_zeroed_blocks_read_as_zero_and_their_neighbours_are_unchanged() {
    for lba in [512, 4096] {
        let rig = Rig::new(Options { lba, ..small() });
        let (nvme, mut queues) = rig.up(1);
        let queue = &mut *queues[0];
        (0..64 << 10).for_each(|offset| rig.guest.write_u8(offset, 0x5a));
        transfer(&rig, queue, true, 0, &[span(0, 16 * u64::from(lba))]);
        let limits = nvme.geometry().discard.unwrap();
        assert_eq!((limits.ranges, limits.range_blocks), (256, u32::MAX));
        assert!(nvme.geometry().zeroes.unwrap().deallocates);

        queue.discard(&[Blocks { first: 1, count: 2 }, Blocks { first: 5, count: 1 }], 3).unwrap();
        queue.ring();
        let done = collect(queue, 1);
        assert_eq!((done[0].tag, done[0].outcome), (3, Outcome::Success));
        for (block, deallocate) in [(8, false), (10, true)] {
            let command = Command::WriteZeroes { block, count: 1, deallocate };
            assert_eq!(run(queue, command, &[], 0), Outcome::Success);
        }

        let found = on_medium(&rig, queue, 0, 16);
        for (block, bytes) in found.chunks(lba as usize).enumerate() {
            let wanted = if [1, 2, 5, 8, 10].contains(&block) { 0 } else { 0x5a };
            assert!(bytes.iter().all(|&byte| byte == wanted), "block {block} of {lba}");
        }
        assert_eq!(rig.machine.iommu().faults(), []);
    }
}

#[test]
fn one_command_discards_256_ranges() {
    let rig = Rig::new(small());
    let (_nvme, mut queues) = rig.up(1);
    let ranges: Vec<_> = (0..256).map(|n| Blocks { first: 2 * n, count: 1 }).collect();
    (0..512 << 9).for_each(|offset| rig.guest.write_u8(offset, 1));
    transfer(&rig, &mut *queues[0], true, 0, &[span(0, 512 << 9)]);

    queues[0].discard(&ranges, 0).unwrap();
    queues[0].ring();

    assert_eq!(collect(&mut *queues[0], 1)[0].outcome, Outcome::Success);
    let found = on_medium(&rig, &mut *queues[0], 0, 512);
    assert!(found.chunks(512).enumerate().all(|(block, bytes)| bytes[0] == (block % 2) as u8));
}

#[test]
fn ranges_past_the_end_fail() {
    let rig = Rig::new(small());
    let (nvme, mut queues) = rig.up(1);
    let blocks = nvme.geometry().blocks;
    queues[0].discard(&[Blocks { first: blocks - 1, count: 2 }], 0).unwrap();
    queues[0].ring();
    assert_eq!(collect(&mut *queues[0], 1)[0].outcome, Outcome::Failed);
}

#[test]
fn limits_come_from_both_identify_controller_structures() {
    let rig = Rig::new(small());
    let limits = [&[0, 2, 0, 3][..], &7_u32.to_le_bytes(), &20_u64.to_le_bytes()].concat();
    rig.machine.inject(Fault::Identify { cns: 6, offset: 0, bytes: limits });
    let geometry = rig.bring_up(nvme_options(1)).unwrap().geometry().clone();
    assert_eq!(geometry.discard, Some(DiscardLimits { ranges: 3, range_blocks: 7, blocks: 20 }));
    assert_eq!(geometry.zeroes, Some(ZeroesLimits { blocks: 32, deallocates: true }), "WZSL: 16 KiB");

    rig.machine.clear_faults();
    rig.machine.inject(Fault::always(Commands::admin(6), Effect::Status(Status::INVALID_FIELD)));
    assert!(rig.bring_up(nvme_options(1)).is_err(), "Identify Controller is mandatory");

    rig.machine.clear_faults();
    rig.machine.inject(Fault::Identify { cns: 1, offset: 520, bytes: vec![0, 0] });
    let geometry = rig.bring_up(nvme_options(1)).unwrap().geometry().clone();
    assert_eq!((geometry.discard, geometry.zeroes), (None, None), "ONCS reports neither command");
}

#[test]
fn without_wzsl_write_zeroes_is_limited_by_mdts() {
    let rig = Rig::new(Options { mdts: 3, ..small() });
    let fourth_identify =
        Fault::Command { on: Commands::admin(6), skip: 3, times: 1, effect: Effect::Status(Status::INVALID_FIELD) };
    rig.machine.inject(fourth_identify);

    let geometry = rig.bring_up(nvme_options(1)).unwrap().geometry().clone();

    assert_eq!(geometry.zeroes.unwrap().blocks, (4096 << 3) / 512);
    assert_eq!(geometry.discard.unwrap().ranges, 256);
}

#[test]
fn an_sgl_describes_what_prps_cannot_without_bouncing() {
    for (sgls, bounced) in [(1, 0), (2, 1)] {
        let rig = Rig::new(Options { sgl: true, ..small() });
        rig.machine.inject(Fault::Identify { cns: 1, offset: 536, bytes: vec![sgls] });
        let (_nvme, mut queues) = rig.up(1);
        fill(&rig, 0, 1 << 16);
        let gaps = [span(0x0204, 0x1800), span(0x3008, 0x0200), span(0x5ff0, 0x2000)];
        let odd = [span(0x9001, 300), span(0xa003, 212)];

        let lists = transfer(&rig, &mut *queues[0], true, 0, &gaps);
        let bytes = transfer(&rig, &mut *queues[0], true, 100, &odd);

        assert_eq!(lists, [1, 0], "one command for three buffers with gaps between them");
        assert_eq!(bytes, [1 - bounced, bounced], "byte alignment only if the controller supports it");
        let wanted: Vec<u8> = offsets(&odd, 0, 512).into_iter().map(pattern).collect();
        assert_eq!(on_medium(&rig, &mut *queues[0], 100, 1), wanted);
        let wanted: Vec<u8> = offsets(&gaps, 0, 0x3a00).into_iter().map(pattern).collect();
        assert_eq!(on_medium(&rig, &mut *queues[0], 0, 0x1d), wanted);
        assert_eq!(rig.machine.iommu().faults(), []);
    }
}
