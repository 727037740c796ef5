//! A front-end that sends raw bytes, including messages that no library would send.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv,
    recvmsg, sendmsg,
};

/// Requests by name (vhost-user: "Front-end message types").
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_LOG_FD: u32 = 7;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SEND_RARP: u32 = 19;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    pub(crate) const SET_STATUS: u32 = 39;
    pub(crate) const GET_STATUS: u32 = 40;
    pub(crate) const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
}

use request::*;

pub(crate) const NEED_REPLY: u32 = 8;
/// VERSION_1, EVENT_IDX, INDIRECT_DESC, PROTOCOL_FEATURES.
pub(crate) const FEATURES: u64 = 1 << 32 | 7 << 28;
/// MQ REPLY_ACK CONFIG RESET_DEVICE CONFIGURE_MEM_SLOTS STATUS.
pub(crate) const PROTOCOL: u64 = 0x1_a209;
pub(crate) const BACKEND_REQ: u64 = 1 << 5;
pub(crate) const GPA_ADDRESSES: u64 = 1 << 21;
pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
pub(crate) const LOG_SHMFD: u64 = 1 << 1;
/// GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN.
pub(crate) const BASE_INFLIGHT: u64 = 1 << 20;
pub(crate) const SKIP_DRAIN: u64 = 1 << 23;
/// All protocol features that the server offers.
pub(crate) const OFFERED: u64 =
    PROTOCOL | BACKEND_REQ | GPA_ADDRESSES | INFLIGHT_SHMFD | LOG_SHMFD | BASE_INFLIGHT | SKIP_DRAIN;
pub(crate) const RING_PACKED: u64 = 1 << 34;

/// The server's reaction to a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Message(u32, Vec<u8>),
    Closed,
}

/// The front-end's side of a connection.
pub(crate) struct Wire {
    pub(crate) socket: UnixStream,
}

/// A memory region description (vhost-user: "Memory region description").
#[derive(Clone, Copy)]
pub(crate) struct MemoryRegion {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) qva: u64,
    pub(crate) offset: u64,
}

impl MemoryRegion {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        words(&[self.gpa, self.len, self.qva, self.offset])
    }
}

/// 64-bit words in the byte order of the host.
pub(crate) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// The payload of a vring state message.
pub(crate) fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

/// A whole message.
pub(crate) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [&request.to_ne_bytes()[..], &(1 | flags).to_ne_bytes(), &size.to_ne_bytes(), payload].concat()
}

impl Wire {
    /// A server that does not reply fails the test after a time-out.
    pub(crate) fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket }
    }

    /// Sends raw bytes, with descriptors on the first of them.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => assert_eq!(sent, bytes.len()),
            Err(Errno::PIPE | Errno::CONNRESET) => {}
            Err(error) => panic!("send: {error}"),
        }
    }

    pub(crate) fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&message(request, 0, payload), fds);
    }

    /// Sends a message that requests an acknowledgement, and returns the acknowledgement: 0 for success.
    pub(crate) fn call(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.send_bytes(&message(request, NEED_REPLY, payload), fds);
        self.reply_u64(request)
    }

    /// The 64-bit reply to `request`.
    pub(crate) fn reply_u64(&self, request: u32) -> u64 {
        match self.reply() {
            Reply::Message(code, payload) if code == request => u64::from_ne_bytes(payload.try_into().unwrap()),
            other => panic!("expected the reply to request {request}, got {other:?}"),
        }
    }

    /// Sends `request` and returns the 64-bit value of its reply.
    pub(crate) fn get(&self, request: u32) -> u64 {
        self.send(request, &[], &[]);
        self.reply_u64(request)
    }

    pub(crate) fn reply(&self) -> Reply {
        let Some(header) = self.receive(12) else { return Reply::Closed };
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 1 | 4, "version 1, reply");
        let payload = self.receive(word(8) as usize).expect("a whole reply");
        Reply::Message(word(0), payload)
    }

    /// The next reply, and the descriptor that came with it.
    pub(crate) fn reply_with_descriptor(&self) -> (Reply, Option<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // Descriptors come with the first byte. It stays, for `reply`; the descriptor received is a copy.
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags).expect("no reply");
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        (self.reply(), descriptor)
    }

    fn receive(&self, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match recv(&self.socket, &mut bytes[done..], RecvFlags::empty()) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return None,
                Ok((_, count)) => done += count,
                Err(error) => panic!("no reply: {error}"),
            }
        }
        Some(bytes)
    }

    /// True if the server closes the connection without a reply.
    pub(crate) fn is_closed(&self) -> bool {
        self.reply() == Reply::Closed
    }

    /// Waits until the server has handled all messages sent so far.
    pub(crate) fn sync(&self) {
        self.get(GET_FEATURES);
    }

    /// Negotiates the default features.
    pub(crate) fn negotiate(&self) -> &Self {
        self.negotiate_with(FEATURES, PROTOCOL)
    }

    pub(crate) fn negotiate_with(&self, features: u64, protocol: u64) -> &Self {
        assert_eq!(features & !self.get(GET_FEATURES), 0, "offered");
        assert_eq!(protocol & !self.get(GET_PROTOCOL_FEATURES), 0, "offered");
        self.send(SET_PROTOCOL_FEATURES, &words(&[protocol]), &[]);
        self.send(SET_OWNER, &[], &[]);
        assert_eq!(self.call(SET_FEATURES, &words(&[features]), &[]), 0);
        self
    }

    pub(crate) fn add_region(&self, place: MemoryRegion, file: BorrowedFd<'_>) -> u64 {
        self.call(ADD_MEM_REG, &[words(&[0]), place.bytes()].concat(), &[file])
    }

    pub(crate) fn remove_region(&self, place: MemoryRegion) -> u64 {
        self.call(REM_MEM_REG, &[words(&[0]), place.bytes()].concat(), &[])
    }

    pub(crate) fn set_table(&self, regions: &[(MemoryRegion, BorrowedFd<'_>)]) -> u64 {
        let mut payload = state(u32::try_from(regions.len()).unwrap(), 0);
        regions.iter().for_each(|(place, _)| payload.extend(place.bytes()));
        let fds: Vec<_> = regions.iter().map(|(_, fd)| *fd).collect();
        self.call(SET_MEM_TABLE, &payload, &fds)
    }

    /// GET_VRING_BASE.
    pub(crate) fn stop_ring(&self, index: u32) -> u32 {
        self.base_by(GET_VRING_BASE, index)
    }

    /// GET_VRING_BASE_SKIP_DRAIN.
    pub(crate) fn suspend_ring(&self, index: u32) -> u32 {
        self.base_by(GET_VRING_BASE_SKIP_DRAIN, index)
    }

    fn base_by(&self, request: u32, index: u32) -> u32 {
        self.send(request, &state(index, 0), &[]);
        match self.reply() {
            Reply::Message(code, payload) if code == request && payload[..4] == index.to_ne_bytes() => {
                u32::from_ne_bytes(payload[4..].try_into().unwrap())
            }
            other => panic!("expected the base of ring {index}, got {other:?}"),
        }
    }
}
