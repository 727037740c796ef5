//! A front-end cannot fill the log, however often it repeats what it does or connects again.

use std::os::fd::AsFd;

use testbed::kept_log::{keep_log, lines, lines_with};
use testbed::own_process::in_own_process;
use vhost_device_vfio::emulated::Fault;

use crate::client::VERSION;
use crate::rig::{Rig, memory};

const READ_WRITE: u32 = 3;

#[test]
fn the_maps_of_a_boot_are_all_shown_and_those_of_a_flood_are_counted() {
    if !in_own_process("log_lines::the_maps_of_a_boot_are_all_shown_and_those_of_a_flood_are_counted") {
        return;
    }
    keep_log();
    let rig = Rig::new();
    let file = memory(0x1000);
    let map_and_unmap = |times: u64| {
        let mut client = rig.client();
        for _ in 0..times {
            client.dma_map((0xc_0000, 0x1000), (Some(file.as_fd()), 0), READ_WRITE).unwrap();
            client.dma_unmap(0xc_0000, 0x1000, 0).unwrap();
        }
    };

    map_and_unmap(60);
    assert_eq!((lines_with("DMA map 0xc0000+4K"), lines_with("DMA unmap 0xc0000+4K")), (60, 60));
    // The next front-end has no more lines than this one.
    (0..4).for_each(|_| map_and_unmap(500));
    drop(rig);

    let shown = lines_with("DMA map 0xc0000+4K") + lines_with("DMA unmap 0xc0000+4K");
    assert!(shown < 600, "{shown}");
    assert_eq!(lines_with(&format!("({} similar messages suppressed)", 120 + 4000 - shown)), 1);
}

#[test]
fn a_front_end_that_connects_again_and_again_gets_no_more_lines() {
    if !in_own_process("log_lines::a_front_end_that_connects_again_and_again_gets_no_more_lines") {
        return;
    }
    keep_log();
    let rig = Rig::new();

    for _ in 0..60 {
        let mut client = rig.connect();
        (0..8).for_each(|_| assert!(client.call(VERSION, &[0, 0, 1], &[]).is_err()));
        client.version().unwrap();
        client.dma_map((0xe000_0000, 0x1000), (None, 0), READ_WRITE).unwrap();
    }

    assert!(lines_with("refused:") <= 16, "{}", lines_with("refused:"));
    assert!(lines_with("front-end ") <= 32, "{}", lines_with("front-end "));
    drop(rig);
    let lines = lines();
    assert!(lines.len() < 150, "{lines:#?}");
}

#[test]
fn a_function_that_cannot_be_assigned_ends_the_connection_after_a_few_attempts() {
    if !in_own_process("log_lines::a_function_that_cannot_be_assigned_ends_the_connection_after_a_few_attempts") {
        return;
    }
    keep_log();
    let rig = Rig::new();
    rig.machine.inject(Fault::ResetRefused);

    for _ in 0..50 {
        let mut client = rig.connect();
        for _ in 0..4 {
            assert!(client.call(VERSION, &[0, 0, 1, 0], &[]).is_err());
        }
        assert!(client.receive().is_none());
    }

    assert!(lines_with("stop DMA and reset") <= 24, "{}", lines_with("stop DMA and reset"));
}
