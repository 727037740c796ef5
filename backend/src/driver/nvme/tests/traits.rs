//! What controllers report about themselves, and how some misbehave.

use std::time::Duration;

use super::rig::{Rig, collect, nvme_options, run, small, span};
use crate::driver::nvme::{Avoid, NvmeErrorKind, NvmeOptions};
use crate::driver::{Command, DiscardLimits, Driver, Outcome, ZeroesLimits};
use crate::emulated::{AnaState, Mode, Options, Traits};
use crate::hardware::Function;

const ONE_BLOCK: Command = Command::Read { block: 0, count: 1 };
/// CMBMSC. NVMe 2.0 §3.1.3.14
const CMBMSC: usize = 0x50;

fn rig(traits: Traits) -> Rig {
    Rig::new(Options { traits, ..small() })
}

#[test]
fn preferences_reach_the_geometry() {
    let traits = Traits {
        write_granularity: 8,
        write_alignment: 16,
        write_size: 64,
        atomic_blocks: 32,
        atomic_offset: 4,
        io_boundary: 256,
        ..Traits::default()
    };
    let (nvme, _queues) = rig(traits).up(1);

    let geometry = nvme.geometry();

    assert_eq!(geometry.physical_block_size, 16 * 512, "the coarser of NPWG and NPWA");
    assert_eq!(geometry.alignment_offset, 4 * 512, "NABO");
    assert_eq!((geometry.optimal_size, geometry.boundary), (64 * 512, 256), "NOWS, NOIOB");
}

#[test]
fn a_physical_block_is_no_larger_than_what_is_written_atomically_and_its_offset_lies_inside() {
    let traits = Traits { write_granularity: 64, atomic_blocks: 8, atomic_offset: 8, ..Traits::default() };
    let (nvme, _queues) = rig(traits).up(1);

    assert_eq!((nvme.geometry().physical_block_size, nvme.geometry().alignment_offset), (8 * 512, 0));
}

#[test]
fn limits_of_commands_without_data_reach_the_geometry() {
    let traits = Traits {
        zeroes_limit: 3,
        discard_ranges: 16,
        discard_range_blocks: 500,
        discard_blocks: 6000,
        ..Traits::default()
    };
    let (nvme, _queues) = rig(traits).up(1);

    let geometry = nvme.geometry();

    assert_eq!(geometry.discard, Some(DiscardLimits { ranges: 16, range_blocks: 500, blocks: 6000 }));
    assert_eq!(geometry.zeroes, Some(ZeroesLimits { blocks: 64, deallocates: true }));
}

#[test]
fn a_path_that_is_not_accessible_is_refused_with_its_state() {
    for (state, name) in [
        (AnaState::Inaccessible, "inaccessible"),
        (AnaState::PersistentLoss, "lost for good"),
        (AnaState::Change, "about to change"),
    ] {
        let rig = rig(Traits { ana: Some(state), ..Traits::default() });

        let error = rig.bring_up(nvme_options(1)).err().unwrap();

        assert!(matches!(error.kind, NvmeErrorKind::Path { namespace: 1, .. }), "{error}");
        assert!(error.to_string().contains(&format!("the path to namespace 1 is {name}")), "{error}");
        rig.assert_stopped();
        rig.machine.set_ana(AnaState::NonOptimized);
        assert!(rig.bring_up(nvme_options(1)).is_ok(), "a slower path is served");
    }
}

#[test]
fn a_path_that_is_lost_during_a_recovery_is_recovered_when_it_is_back() {
    let rig = rig(Traits { ana: Some(AnaState::Optimized), ..Traits::default() });
    let (mut nvme, queues) = rig.up(1);
    drop(queues);
    rig.machine.set_ana(AnaState::Inaccessible);
    assert!(nvme.recover().is_err());

    rig.machine.set_ana(AnaState::Optimized);

    let mut queues = nvme.recover().unwrap();
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_memory_buffer_whose_addresses_are_on_is_turned_off_before_the_controller_is_enabled() {
    let rig = rig(Traits { memory_buffer: true, ..Traits::default() });
    assert_ne!(rig.function.registers(0).unwrap().read64(CMBMSC), 0, "left on by somebody else");

    let (_nvme, mut queues) = rig.up(1);

    assert_eq!(rig.function.registers(0).unwrap().read64(CMBMSC), 0);
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_controller_that_is_silent_after_it_is_enabled_or_disabled_is_not_taken_for_gone() {
    let traits = Traits { ready_delay: Duration::from_millis(50), ..Traits::default() };
    let rig = Rig::new(Options { mode: Mode::Threaded, traits, ..small() });
    let (mut nvme, queues) = rig.up(1);
    drop(queues);

    let mut queues = nvme.recover().unwrap();

    assert_eq!(rig.function.faults.resets.load(std::sync::atomic::Ordering::SeqCst), 0);
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn a_drive_with_one_working_vector_can_be_told_to_use_no_other() {
    let rig = Rig::new(small());
    let mut nvme = rig.bring_up(NvmeOptions { avoid: vec![Avoid::Vectors], ..nvme_options(4) }).unwrap();

    let mut queues = nvme.take_queues();

    assert_eq!(queues.len(), 1);
    assert_eq!(run(&mut *queues[0], ONE_BLOCK, &[span(0, 512)], 512), Outcome::Success);
}

#[test]
fn shared_tags_are_disjoint_and_within_the_queue_or_the_drive_refuses_commands() {
    let with = |avoid: Vec<Avoid>, entries| {
        let traits = Traits { shared_tags: true, ..Traits::default() };
        let rig = Rig::new(Options { queue_entries: entries, traits, ..small() });
        let up = rig.bring_up(NvmeOptions { avoid, ..nvme_options(2) });
        let mut nvme = up.map_err(|error| error.to_string())?;
        let mut queues = nvme.take_queues();
        let mut all_succeed = true;
        for _ in 0..20 {
            for tag in 0..25 {
                queues[0].submit(ONE_BLOCK, &[span(0, 512)], 0, 512, tag).unwrap();
            }
            queues[0].ring();
            all_succeed &= collect(&mut *queues[0], 25).iter().all(|done| done.outcome == Outcome::Success);
        }
        Ok::<_, String>((queues.len(), all_succeed))
    };

    assert_eq!(with(vec![Avoid::Tags], 64), Ok((1, true)));
    assert_eq!(with(vec![], 64), Ok((2, false)), "identifiers above the size of the queue");
    assert!(with(vec![Avoid::Tags], 33).unwrap_err().contains("33 entries, but 34 or more with shared tags is needed"));
}
