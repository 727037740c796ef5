//! A front-end that is given the device's own file, to map a BAR, and what it can do with it afterwards.

use std::os::fd::{AsFd, OwnedFd};

use vhost_device_vfio::vfio_user::EndReason;

use crate::client::{Client, GET_REGION_INFO, VERSION, words};
use crate::rig::{Rig, event};

const EBUSY: u32 = 16;
/// `VFIO_REGION_INFO_FLAG_MMAP`.
const MMAP: u32 = 4;

/// The flags of BAR 0, and the file to map it with.
fn bar_0(client: &mut Client) -> (u32, Option<OwnedFd>) {
    let reply = client.call(GET_REGION_INFO, &words(&[32, 0, 0, 0, 0, 0, 0, 0]), &[]).unwrap();
    let flags = u32::from_ne_bytes(reply.payload[4..8].try_into().unwrap());
    (flags, reply.fds.into_iter().next())
}

/// A front-end gets the device's own file, and leaves.
fn file_of_a_former_front_end(rig: &Rig) -> OwnedFd {
    bar_0(&mut rig.client()).1.expect("the device's own file")
}

/// Waits until the server has seen its front-end leave.
fn disconnected(rig: &Rig) {
    // Its first message is answered only if nobody else is connected. An unknown version needs no function.
    rig.wait_until(|rig| {
        let mut client = rig.connect();
        client.send(VERSION, 0, &[9, 0, 0, 0], &[]);
        client.receive().is_some()
    });
}

#[test]
fn whoever_keeps_the_file_keeps_others_out_until_it_is_closed() {
    let (rig, _) = Rig::with_own_file();
    let file = file_of_a_former_front_end(&rig);
    let duplicate = file.try_clone().unwrap();
    // One that connects and leaves without a word changes nothing.
    drop(rig.connect());
    disconnected(&rig);

    let refused = rig.connect().version();
    drop(file);
    disconnected(&rig);
    let refused_by_the_duplicate = rig.connect().version();
    drop(duplicate);
    disconnected(&rig);

    assert_eq!((refused.unwrap_err(), refused_by_the_duplicate.unwrap_err()), (EBUSY, EBUSY));
    assert_eq!(bar_0(&mut rig.client()).0 & MMAP, MMAP, "the next one is served, and given the new file");
}

#[test]
fn a_front_end_waits_for_a_former_one_that_is_still_ending() {
    let (rig, _) = Rig::with_own_file();
    let file = file_of_a_former_front_end(&rig);
    disconnected(&rig);
    let mut next = rig.connect();
    next.send(VERSION, 0, &[0, 0, 1, 0], &[]);
    std::thread::sleep(std::time::Duration::from_millis(200));

    drop(file);

    assert_eq!(next.receive().expect("an answer").error, 0);
}

#[test]
fn the_function_is_acquired_anew_and_hears_the_host_without_waiting_for_a_front_end() {
    let (rig, cdev) = Rig::with_own_file();
    let file = file_of_a_former_front_end(&rig);
    disconnected(&rig);
    // The holder of the file has routed the host's request away.
    rig.machine.whole_function().route_removal(event().as_fd()).unwrap();

    drop(file);
    rig.wait_until(|_| cdev.bind().is_err());
    // The bind comes before the route.
    disconnected(&rig);
    rig.machine.request_removal();

    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

#[test]
fn a_front_end_that_accepts_no_descriptors_gets_no_file() {
    let (rig, _) = Rig::with_own_file();
    let mut client = rig.connect();
    let text = [&[0, 0, 1, 0][..], br#"{"capabilities":{"max_msg_fds":0}}"#, b"\0"].concat();
    client.call(VERSION, &text, &[]).unwrap();

    let (flags, file) = bar_0(&mut client);

    assert_eq!((flags & MMAP, file.is_none()), (0, true), "the region is accessed by messages");
}
