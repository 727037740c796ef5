//! A front-end that sends raw bytes. It is written from the specification alone (QEMU: docs/interop/vfio-user.rst).

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const GET_REGION_INFO: u16 = 5;
pub(crate) const GET_IRQ_INFO: u16 = 7;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const DEVICE_RESET: u16 = 13;

pub(crate) const NO_REPLY: u32 = 1 << 4;
/// `VFIO_PCI_CONFIG_REGION_INDEX`.
pub(crate) const CONFIG: u32 = 7;

/// The capabilities that QEMU 11.1 sends.
pub(crate) const CAPABILITIES: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"pgsizes":4096,
    "max_dma_maps":65535,"migration":{"pgsize":4096,"max_bitmap_size":268435456},"write_multiple":true}}"#;

/// Time-out of a reply.
const LIMIT: Duration = Duration::from_secs(20);

/// One message from the server.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) id: u16,
    pub(crate) command: u16,
    pub(crate) flags: u32,
    pub(crate) error: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A connected front-end.
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    id: u16,
}

impl Client {
    pub(crate) fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self { socket, id: 0x40 }
    }

    /// Sends a command with a valid header. Returns its message ID.
    pub(crate) fn send(&mut self, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        self.id = self.id.wrapping_add(1);
        let size = u32::try_from(16 + payload.len()).unwrap();
        self.raw(&[&header(self.id, command, size, flags), payload].concat(), fds);
        self.id
    }

    /// Sends raw bytes.
    pub(crate) fn raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        // The server may have disconnected, which a later `receive` reports.
        let _ = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    }

    /// The next message of the server; `None` if it has disconnected.
    pub(crate) fn receive(&mut self) -> Option<Reply> {
        let mut header = [0; 16];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.socket, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC);
        match received {
            Ok(received) if received.bytes == 16 => {}
            Ok(received) if received.bytes == 0 => return None,
            Err(rustix::io::Errno::CONNRESET) => return None,
            other => panic!("expected a header, got {other:?}"),
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_ne_bytes(header[at..at + 2].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize - 16];
        self.socket.read_exact(&mut payload).unwrap();
        Some(Reply { id: half(0), command: half(2), flags: word(8), error: word(12), payload, fds })
    }

    /// Sends a command and returns its reply, or the errno in it.
    pub(crate) fn call(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Reply, u32> {
        let id = self.send(command, 0, payload, fds);
        let reply = self.receive().expect("a reply");
        assert_eq!((reply.id, reply.command, reply.flags & 0xf), (id, command, 1), "{reply:?}");
        if reply.flags & 1 << 5 == 0 {
            return Ok(reply);
        }
        assert!(reply.payload.is_empty() && reply.fds.is_empty(), "an error is only a header: {reply:?}");
        Err(reply.error)
    }

    pub(crate) fn version(&mut self) -> Result<Reply, u32> {
        let text = [&[0, 0, 1, 0], CAPABILITIES.as_bytes(), b"\0"].concat();
        self.call(VERSION, &text, &[])
    }

    pub(crate) fn dma_map(
        &mut self,
        (address, size): (u64, u64),
        (file, offset): (Option<BorrowedFd<'_>>, u64),
        flags: u32,
    ) -> Result<Reply, u32> {
        let payload = [&words(&[32, flags]), &longs(&[offset, address, size])[..]].concat();
        self.call(DMA_MAP, &payload, file.as_slice())
    }

    pub(crate) fn dma_unmap(&mut self, address: u64, size: u64, flags: u32) -> Result<Reply, u32> {
        self.call(DMA_UNMAP, &[&words(&[24, flags]), &longs(&[address, size])[..]].concat(), &[])
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let reply = self.call(REGION_READ, &access(region, offset, count), &[])?;
        let (fixed, data) = reply.payload.split_at(16);
        assert_eq!(fixed, access(region, offset, count));
        Ok(data.to_vec())
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, bytes: &[u8]) -> Result<(), u32> {
        let count = u32::try_from(bytes.len()).unwrap();
        let reply = self.call(REGION_WRITE, &[&access(region, offset, count), bytes].concat(), &[])?;
        assert_eq!(reply.payload, access(region, offset, count));
        Ok(())
    }

    /// `flags` are `VFIO_IRQ_SET_*`.
    pub(crate) fn set_irqs(
        &mut self,
        flags: u32,
        [index, start, count]: [u32; 3],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, u32> {
        self.call(SET_IRQS, &words(&[20, flags, index, start, count]), fds)
    }
}

pub(crate) fn header(id: u16, command: u16, size: u32, flags: u32) -> Vec<u8> {
    let halves = [id, command].map(u16::to_ne_bytes).concat();
    [&halves, &words(&[size, flags, 0])[..]].concat()
}

pub(crate) fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    [&longs(&[offset]), &words(&[region, count])[..]].concat()
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}
