//! Descriptors that cannot be used, or that there is no room for. The message is refused, and the connection continues.

use std::os::fd::AsFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testbed::own_process::in_own_process;

use crate::rig::{Rig, memory};
use crate::wire::{MemoryRegion, NEED_REPLY, message, request::*, words};

const PAGE: u64 = 4096;

fn page(number: u64) -> MemoryRegion {
    MemoryRegion { gpa: number * PAGE, len: PAGE, qva: (1 << 40) + number * PAGE, offset: 0 }
}

#[test]
fn a_region_without_room_for_its_descriptor_is_refused() {
    if !in_own_process("descriptors::a_region_without_room_for_its_descriptor_is_refused") {
        return;
    }
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum }).unwrap();
    // Each takes one descriptor of this process, which is both front-end and server, and needs two while it is added.
    let add = |number: u64| wire.add_region(page(number), memory("ram", PAGE).as_fd());

    let added = (0..64).take_while(|number| add(*number) == 0).count();

    assert!((1..64).contains(&added), "{added}");
    assert_eq!(rig.guest_memory().len(), added);
    assert_eq!(wire.remove_region(page(0)), 0);
    assert_eq!(add(0), 0);
}

#[test]
fn events_of_a_virtqueue_must_be_eventfds() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", PAGE));
    wire.negotiate();
    let (pipe, writer) = rustix::pipe::pipe().unwrap();

    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for fd in [file.as_fd(), wire.socket.as_fd(), pipe.as_fd(), writer.as_fd()] {
            assert_eq!(wire.call(request, &words(&[0]), &[fd]), 1);
        }
    }
}

#[test]
fn descriptors_in_the_middle_of_a_message_end_the_connection() {
    let rig = Rig::new();
    let file = memory("ram", PAGE);
    let bytes = message(ADD_MEM_REG, NEED_REPLY, &[words(&[0]), page(1).bytes()].concat());
    for first in [&[][..], &[file.as_fd()]] {
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes[..12], first);
        wire.send_bytes(&bytes[12..], &[file.as_fd()]);
        assert!(wire.is_closed());
    }
    rig.connect().negotiate();
}
