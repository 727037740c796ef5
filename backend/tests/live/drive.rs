//! The drive as one of the two processes serves it, and what passes between them.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use vhost_device_vfio::acquire::hand_over::{Exported, FunctionDescription};
use vhost_device_vfio::addr::{Iova, Span};
use vhost_device_vfio::coherency::{Facts, decide};
use vhost_device_vfio::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use vhost_device_vfio::driver::{Command, DiskState, Driver, Outcome, Queue};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::iommu::LiveSpace;
use vhost_device_vfio::memory::Region;
use vhost_device_vfio::vfio::no_snoop;

use super::super::MIB;

/// Bytes of one transfer, and the guest address of the page that is written to the disk and of the one it is read to.
const BYTES: u32 = 4096;
const SOURCE: u64 = 3 * MIB;
const TARGET: u64 = 5 * MIB;
/// Where the guest's memory is mapped.
pub(super) const BASE: u64 = 0x1_0000_0000;

/// The drive as a process serves it.
pub(super) struct Drive {
    pub(super) nvme: Box<Nvme>,
    pub(super) queues: Vec<Box<dyn Queue>>,
    pub(super) space: LiveSpace,
}

impl Drive {
    pub(super) fn bring_up(function: Arc<dyn Function>, space: &LiveSpace, facts: &Facts) -> Self {
        let function = no_snoop::apply(function, decide(facts)).unwrap();
        let options = NvmeOptions {
            namespaces: Vec::new(),
            queues: 2,
            read_only: false,
            interrupts: InterruptPolicy::Auto,
            avoid: Vec::new(),
        };
        let mut nvme = Box::new(Nvme::bring_up(function, Arc::new(space.clone()), options).unwrap());
        let queues = nvme.take_queues();
        Self { nvme, queues, space: space.clone() }
    }

    /// One command, whose completion must be announced by an interrupt.
    fn run(&mut self, command: Command, at: u64) {
        let queue = &mut self.queues[1];
        queue.set_interrupt_wanted(true);
        let buffer = Span::new(Iova(BASE + at), BYTES.into()).unwrap();
        queue.submit(command, &[buffer], 0, BYTES, 7).unwrap();
        queue.ring();
        let mut outcome = None;
        while outcome.is_none() {
            let mut events = [PollFd::from_borrowed_fd(queue.event(), PollFlags::IN)];
            let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_eq!(poll(&mut events, Some(&limit)), Ok(1), "no interrupt for {command:?}");
            queue.reap(&mut |completion| outcome = Some(completion.outcome));
        }
        assert_eq!(outcome, Some(Outcome::Success), "{command:?}");
    }

    /// Writes `value` to the disk from guest memory, reads it back to another page, and compares.
    pub(super) fn verify(&mut self, region: &Region, value: u8) {
        let count = BYTES / self.nvme.geometry().block_size;
        region.memory().copy_from(SOURCE as usize, &[value; BYTES as usize]);
        self.run(Command::Write { block: 64, count }, SOURCE);
        self.check(region, value);
    }

    /// Reads what is on the disk, and compares.
    pub(super) fn check(&mut self, region: &Region, value: u8) {
        let count = BYTES / self.nvme.geometry().block_size;
        region.memory().copy_from(TARGET as usize, &[!value; BYTES as usize]);
        self.run(Command::Read { block: 64, count }, TARGET);
        let mut found = [0; BYTES as usize];
        region.memory().copy_to(TARGET as usize, &mut found);
        assert_eq!(found, [value; BYTES as usize]);
    }

    pub(super) fn end(mut self, region: &Region) {
        self.queues.clear();
        self.space.remove(region).unwrap();
        self.nvme.shut_down();
    }
}

/// Sends what a successor needs, and the guest's memory.
pub(super) fn send(socket: &UnixStream, exported: &Exported, disk: &DiskState, guest: &File) {
    let text = serde_json::to_vec(&(exported.description(), disk)).unwrap();
    let [device, iommufd] = exported.descriptors();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [device, iommufd, guest.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let len = u32::try_from(text.len()).unwrap().to_le_bytes();
    sendmsg(socket, &[IoSlice::new(&len)], &mut control, SendFlags::empty()).unwrap();
    (&*socket).write_all(&text).unwrap();
}

/// Receives what [`send`] has sent.
pub(super) fn receive(socket: &mut UnixStream) -> (FunctionDescription, DiskState, [OwnedFd; 2], File) {
    let mut len = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    assert_eq!(recvmsg(&*socket, &mut [IoSliceMut::new(&mut len)], &mut control, flags).unwrap().bytes, 4);
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds,
        _ => panic!("another message"),
    });
    let mut next = || fds.next().expect("three descriptors");
    let (device, iommufd, guest) = (next(), next(), next());
    let mut text = vec![0; u32::from_le_bytes(len) as usize];
    socket.read_exact(&mut text).unwrap();
    let (description, disk) = serde_json::from_slice(&text).unwrap();
    (description, disk, [device, iommufd], guest.into())
}
