use std::os::fd::AsFd;
use std::thread;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::client::Client;
use super::message::{Answer, Reply, Request, What, receive, send};
use super::serve;
use crate::vfio::DeviceFile;

fn pair() -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

#[test]
fn the_helper_ends_when_the_other_process_has_ended() {
    let (ours, theirs) = pair();
    let helper = thread::spawn(move || serve::run(&theirs, None));
    drop(ours);
    helper.join().unwrap();
}

#[test]
fn without_a_function_it_opens_nothing() {
    let (ours, theirs) = pair();
    let helper = thread::spawn(move || serve::run(&theirs, None));
    let client = Client::new(ours);
    for file in [DeviceFile::Cdev, DeviceFile::Group, DeviceFile::Container] {
        assert_eq!(client.open(file).unwrap_err().raw_os_error(), Some(libc::ENODEV), "{file:?}");
    }
    drop(client);
    helper.join().unwrap();
}

#[test]
fn it_opens_the_files_of_its_own_function_only() {
    let (ours, theirs) = pair();
    // No machine has a function with this domain.
    let address = "fffffff0:00:00.0".parse().unwrap();
    let helper = thread::spawn(move || serve::run(&theirs, Some(address)));
    let client = Client::new(ours);
    assert_eq!(client.open(DeviceFile::Cdev).unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(client);
    helper.join().unwrap();
}

#[test]
fn an_answer_that_comes_too_late_is_not_taken_for_that_of_the_next_request() {
    let (ours, theirs) = pair();
    let helper = thread::spawn(move || {
        let (request, _): (Request, _) = receive(&theirs).unwrap().unwrap();
        assert!(matches!(request.what, What::OpenCdev));
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&theirs, &Reply { number: request.number - 1, answer: Answer::Failed(libc::EPERM) }, None).unwrap();
        send(&theirs, &Reply { number: request.number, answer: Answer::Opened }, Some(null.as_fd())).unwrap();
    });
    assert!(Client::new(ours).open(DeviceFile::Cdev).is_ok());
    helper.join().unwrap();
}

#[test]
fn a_helper_that_has_ended_is_named() {
    let (ours, theirs) = pair();
    let client = Client::new(ours);
    drop(theirs);
    assert!(client.open(DeviceFile::Cdev).is_err());
}

#[test]
fn nobody_holds_a_function_that_does_not_exist() {
    let (ours, theirs) = pair();
    let address = "fffffff0:00:00.0".parse().unwrap();
    let helper = thread::spawn(move || serve::run(&theirs, Some(address)));
    assert_eq!(Client::new(ours).holder(), None);
    helper.join().unwrap();
}
