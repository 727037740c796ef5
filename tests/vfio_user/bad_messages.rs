//! Invalid messages. Each is answered with an errno or ends its connection. Memory does not change, and the next front-end
//! is served.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::client::{
    CONFIG, Client, DEVICE_RESET, DMA_MAP, DMA_UNMAP, GET_INFO, GET_IRQ_INFO, GET_REGION_INFO, REGION_READ,
    REGION_WRITE, SET_IRQS, VERSION, access, header, longs, words,
};
use crate::rig::{Rig, event, memory};

const EINVAL: u32 = 22;
const ENOENT: u32 = 2;
const ENOTSUP: u32 = 95;

/// A name, a command, its payload, the number of its descriptors, and the errno of the reply.
type Case = (&'static str, u16, Vec<u8>, usize, u32);

fn map(flags: u32, [offset, address, size]: [u64; 3]) -> Vec<u8> {
    [words(&[32, flags]), longs(&[offset, address, size])].concat()
}

fn unmap(flags: u32, [address, size]: [u64; 2]) -> Vec<u8> {
    [words(&[24, flags]), longs(&[address, size])].concat()
}

fn region_info(argsz: u32, index: u32) -> Vec<u8> {
    words(&[argsz, 0, index, 0, 0, 0, 0, 0])
}

fn irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

fn memory_cases() -> Vec<Case> {
    vec![
        ("a map that is too short", DMA_MAP, map(3, [0, 0, 0x1000])[..31].to_vec(), 1, EINVAL),
        ("a map that is too long", DMA_MAP, [map(3, [0, 0, 0x1000]), vec![0]].concat(), 1, EINVAL),
        ("a map without a payload", DMA_MAP, vec![], 1, EINVAL),
        ("a map with two files", DMA_MAP, map(3, [0, 0, 0x1000]), 2, EINVAL),
        ("a map that is write-only", DMA_MAP, map(2, [0, 0, 0x1000]), 1, EINVAL),
        ("a map without access", DMA_MAP, map(0, [0, 0, 0x1000]), 1, EINVAL),
        ("a map with unknown flags", DMA_MAP, map(7, [0, 0, 0x1000]), 1, EINVAL),
        ("a map of an eventfd", DMA_MAP, map(3, [0, 0, 0x1000]), 3, EINVAL),
        ("an unmap of unmapped memory", DMA_UNMAP, unmap(0, [0, 0x1000]), 0, ENOENT),
        ("an unmap that is too short", DMA_UNMAP, unmap(0, [0, 0x1000])[..23].to_vec(), 0, EINVAL),
        ("an unmap with a file", DMA_UNMAP, unmap(0, [0, 0x1000]), 1, EINVAL),
        ("an unmap of all with an address", DMA_UNMAP, unmap(2, [0x1000, 0]), 0, EINVAL),
        ("an unmap of all with a size", DMA_UNMAP, unmap(2, [0, 0x1000]), 0, EINVAL),
        ("an unmap that requests a dirty bitmap", DMA_UNMAP, unmap(1, [0, 0x1000]), 0, ENOTSUP),
        ("an unmap with unknown flags", DMA_UNMAP, unmap(1 << 31, [0, 0x1000]), 0, EINVAL),
    ]
}

fn info_cases() -> Vec<Case> {
    vec![
        ("device info that is too short", GET_INFO, words(&[16, 0, 0]), 0, EINVAL),
        ("device info with a file", GET_INFO, words(&[16, 0, 0, 0]), 1, EINVAL),
        ("region info that is too short", GET_REGION_INFO, region_info(32, 0)[..28].to_vec(), 0, EINVAL),
        ("region info with an argsz that is too small", GET_REGION_INFO, region_info(31, 0), 0, EINVAL),
        ("region info of the first invalid index", GET_REGION_INFO, region_info(32, 9), 0, EINVAL),
        ("region info of the last index", GET_REGION_INFO, region_info(32, u32::MAX), 0, EINVAL),
        ("interrupt info that is too long", GET_IRQ_INFO, words(&[16, 0, 0, 0, 0]), 0, EINVAL),
        ("interrupt info of the first invalid index", GET_IRQ_INFO, words(&[16, 0, 5, 0]), 0, EINVAL),
        ("interrupt info of the last index", GET_IRQ_INFO, words(&[16, 0, u32::MAX, 0]), 0, EINVAL),
        ("a reset with data", DEVICE_RESET, vec![0; 4], 0, EINVAL),
        ("a reset with a file", DEVICE_RESET, vec![], 1, EINVAL),
        ("a second version", VERSION, vec![0, 0, 1, 0], 0, EINVAL),
    ]
}

fn interrupt_cases() -> Vec<Case> {
    const EVENTFD: u32 = 1 << 2 | 1 << 5;
    const BOOL: u32 = 1 << 1 | 1 << 5;
    vec![
        ("no action", SET_IRQS, irqs(1 << 2, 2, 0, 1), 1, EINVAL),
        ("two actions", SET_IRQS, irqs(1 | 1 << 3 | 1 << 5, 2, 0, 1), 0, EINVAL),
        ("no data type", SET_IRQS, irqs(1 << 5, 2, 0, 1), 0, EINVAL),
        ("two data types", SET_IRQS, irqs(0b11 | 1 << 5, 2, 0, 1), 0, EINVAL),
        ("unknown flags", SET_IRQS, irqs(EVENTFD | 1 << 6, 2, 0, 1), 1, EINVAL),
        ("fewer eventfds than vectors", SET_IRQS, irqs(EVENTFD, 2, 0, 3), 2, EINVAL),
        ("more eventfds than vectors", SET_IRQS, irqs(EVENTFD, 2, 0, 1), 2, EINVAL),
        ("a vector too many", SET_IRQS, irqs(EVENTFD, 2, 17, 1), 1, EINVAL),
        ("vectors past the last", SET_IRQS, irqs(EVENTFD, 2, 16, 2), 2, EINVAL),
        ("vectors that wrap around", SET_IRQS, irqs(EVENTFD, 2, u32::MAX, 2), 2, EINVAL),
        ("the largest count", SET_IRQS, irqs(EVENTFD, 2, 0, u32::MAX), 0, EINVAL),
        ("an interrupt that the function does not have", SET_IRQS, irqs(EVENTFD, 0, 0, 1), 1, EINVAL),
        ("an invalid index", SET_IRQS, irqs(EVENTFD, 5, 0, 1), 1, EINVAL),
        ("missing bytes", SET_IRQS, irqs(BOOL, 2, 0, 2), 0, EINVAL),
        ("bytes as well as eventfds", SET_IRQS, [irqs(EVENTFD, 2, 0, 1), vec![1]].concat(), 1, EINVAL),
        ("a payload that is too short", SET_IRQS, irqs(EVENTFD, 2, 0, 1)[..19].to_vec(), 1, EINVAL),
    ]
}

fn region_cases() -> Vec<Case> {
    let write = |region, offset, count, bytes: usize| [access(region, offset, count), vec![0; bytes]].concat();
    vec![
        ("a read past the end", REGION_READ, access(CONFIG, 4095, 2), 0, EINVAL),
        ("a read from the end", REGION_READ, access(CONFIG, 4096, 1), 0, EINVAL),
        ("a read that overflows", REGION_READ, access(CONFIG, u64::MAX, 2), 0, EINVAL),
        ("a read of 0 bytes", REGION_READ, access(CONFIG, 0, 0), 0, EINVAL),
        ("a read of an empty region", REGION_READ, access(1, 0, 4), 0, EINVAL),
        ("a read of an invalid region", REGION_READ, access(9, 0, 4), 0, EINVAL),
        ("a read of the last index", REGION_READ, access(u32::MAX, 0, 4), 0, EINVAL),
        ("a read of more than the negotiated limit", REGION_READ, access(0, 0, (1 << 20) + 1), 0, EINVAL),
        ("a read of the largest size", REGION_READ, access(0, 0, u32::MAX), 0, EINVAL),
        ("a read with data", REGION_READ, write(CONFIG, 0, 4, 4), 0, EINVAL),
        ("a write with too little data", REGION_WRITE, write(CONFIG, 0, 4, 3), 0, EINVAL),
        ("a write with too much data", REGION_WRITE, write(CONFIG, 0, 4, 5), 0, EINVAL),
        ("a write past the end", REGION_WRITE, write(CONFIG, 4093, 4, 4), 0, EINVAL),
        ("a write that overflows", REGION_WRITE, write(0, u64::MAX - 1, 4, 4), 0, EINVAL),
        ("a write of 0 bytes", REGION_WRITE, write(CONFIG, 0, 0, 0), 0, EINVAL),
        ("a write that is too short", REGION_WRITE, vec![0; 15], 0, EINVAL),
        ("a write with a file", REGION_WRITE, write(CONFIG, 0x3c, 1, 1), 1, EINVAL),
    ]
}

fn command_cases() -> Vec<Case> {
    let unknown = [0, 6, 11, 12, 14, 15, 16, 17, 18, 19, u16::MAX];
    unknown.map(|command| ("a command that is not offered", command, vec![0; 16], 0, ENOTSUP)).into()
}

#[test]
fn each_is_answered_with_an_errno_and_the_connection_continues() {
    let rig = Rig::new();
    let mut client = rig.client();
    let (file, one, two) = (memory(0x1_0000), event(), event());
    // A count of three stands for one descriptor that is not memory.
    let fds = |count: usize| -> Vec<BorrowedFd<'_>> {
        match count {
            3 => vec![one.as_fd()],
            count => [file.as_fd(), two.as_fd()][..count].to_vec(),
        }
    };
    let cases = [memory_cases(), info_cases(), interrupt_cases(), region_cases(), command_cases()].concat();
    assert!(cases.len() >= 70, "{}", cases.len());

    for (name, command, payload, descriptors, errno) in cases {
        let result = client.call(command, &payload, &fds(descriptors));
        assert_eq!(result.map(|reply| reply.payload), Err(errno), "{name}");
    }

    assert_eq!(rig.mapped(), 0);
    assert!(client.read(CONFIG, 0, 4).is_ok());
}

#[test]
fn an_invalid_header_ends_the_connection() {
    let rig = Rig::new();
    let headers = [
        ("size 0", header(1, GET_INFO, 0, 0)),
        ("a size less than a header", header(1, GET_INFO, 15, 0)),
        ("the largest size", header(1, REGION_WRITE, u32::MAX, 0)),
        ("one byte more than the limit", header(1, REGION_WRITE, 16 + 16 + (1 << 20) + 1, 0)),
        ("a reply", header(1, GET_INFO, 32, 1)),
        ("an unknown type", header(1, GET_INFO, 32, 0xf)),
    ];
    for (name, bytes) in headers {
        let mut client = rig.client();
        client.raw(&bytes, &[]);
        assert!(client.receive().is_none(), "{name}");
    }
    assert!(rig.client().read(CONFIG, 0, 4).is_ok());
}

#[test]
fn a_first_command_other_than_version_ends_the_connection() {
    let rig = Rig::new();
    let mut client = rig.connect();

    assert_eq!(client.call(GET_INFO, &words(&[16, 0, 0, 0]), &[]).map(|reply| reply.payload), Err(EINVAL));

    assert!(client.receive().is_none());
}

#[test]
fn an_unsupported_version_is_refused_and_ends_the_connection() {
    let rig = Rig::new();
    let texts: [(&str, Vec<u8>, u32); 8] = [
        ("another major version", vec![1, 0, 0, 0], ENOTSUP),
        ("too short", vec![0, 0, 1], EINVAL),
        ("a string without a terminator", b"\0\0\x01\0{}".to_vec(), EINVAL),
        ("not JSON", b"\0\0\x01\0what\0".to_vec(), EINVAL),
        ("not an object", b"\0\0\x01\x001\0".to_vec(), EINVAL),
        ("a limit that is not a number", b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":true}}\0".to_vec(), EINVAL),
        ("pages of another size", b"\0\0\x01\0{\"capabilities\":{\"pgsizes\":65536}}\0".to_vec(), EINVAL),
        ("a string that is too long", [vec![0, 0, 1, 0], vec![b' '; 5000]].concat(), EINVAL),
    ];
    for (name, payload, errno) in texts {
        let mut client = rig.connect();
        assert_eq!(client.call(VERSION, &payload, &[]).map(|reply| reply.payload), Err(errno), "{name}");
        // After one that is too short, another may be sent.
        assert!(payload.len() < 4 || client.receive().is_none(), "{name}");
    }
}

#[test]
fn too_many_descriptors_end_the_connection() {
    let rig = Rig::new();
    let events: Vec<OwnedFd> = (0..17).map(|_| event()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let mut client = rig.client();

    client.send(SET_IRQS, 0, &irqs(1 << 2 | 1 << 5, 2, 0, 17), &fds);

    assert!(client.receive().is_none());
    assert!(rig.client().read(CONFIG, 0, 4).is_ok());
}

#[test]
fn a_message_may_arrive_in_pieces() {
    let rig = Rig::new();
    let mut client = rig.client();
    let message = [header(7, REGION_READ, 32, 0), access(CONFIG, 0, 2)].concat();

    for byte in message {
        client.raw(&[byte], &[]);
        std::thread::sleep(Duration::from_millis(1));
    }

    assert_eq!(client.receive().unwrap().payload[16..], [0xfe, 0xff]);
}

#[test]
fn an_incomplete_message_ends_the_connection_after_a_timeout() {
    let rig = Rig::new();
    let mut client = rig.client();

    client.raw(&header(7, REGION_READ, 32, 0), &[]);

    assert!(client.receive().is_none(), "after 5 s");
    assert!(rig.client().read(CONFIG, 0, 4).is_ok());
}

#[test]
fn a_front_end_that_does_not_read_its_replies_is_disconnected() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.socket.set_nonblocking(true).unwrap();

    let command = [header(1, REGION_READ, 32, 0), access(CONFIG, 0, 4096)].concat();
    flood(&client, &command);

    rig.wait_until(|rig| {
        let mut next = rig.connect();
        next.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        next.send(VERSION, 0, &[0, 0, 1, 0], &[]);
        next.receive().is_some()
    });
    client.socket.set_nonblocking(false).unwrap();
    while client.receive().is_some() {}
}

/// Sends `command` until the socket's buffers are full because the server has stopped reading.
fn flood(client: &Client, command: &[u8]) {
    while rustix::net::send(
        &client.socket,
        command,
        rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT,
    )
    .is_ok()
    {}
}
