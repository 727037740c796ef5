//! The same requests to our server and to a disk in memory built on rust-vmm's `vhost-user-backend` and `virtio-queue`: the
//! same answers. So the test client and our rings agree with somebody else's reading of the specification, not just with
//! each other. The reference knows no packed rings; there our own split ones are what to compare with.

use std::io;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use testbed::client::{Client, Request, Shape};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::tempdir::TempDir;

use crate::rig::Rig;

/// Nothing here takes as long.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of the disk in [`Rig`].
const BYTES: usize = 16 << 20;
const SECTOR: usize = 512;
/// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC and BLK_F_FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 9;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The reference.
struct Disk {
    memory: Memory,
    event_idx: bool,
    data: Vec<u8>,
}

impl Disk {
    /// Does what one chain asks for; gives the bytes written to it.
    fn execute(&mut self, chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>) -> u32 {
        let memory = chain.memory().clone();
        let parts: Vec<_> = chain.collect();
        let [header, data @ .., status] = &*parts else { panic!("a chain of {}", parts.len()) };
        let [kind, sector] = memory.read_obj::<[u64; 2]>(header.addr()).unwrap();
        let start = usize::try_from(sector).unwrap() * SECTOR;
        let len = data.iter().map(|part| part.len() as usize).sum::<usize>();
        let found = self.data.get_mut(start..start + len);
        let (result, written) = match (kind, found) {
            (_, None) => (1_u8, 0),
            (0, Some(found)) => {
                data.iter().for_each(|part| memory.write_slice(found, part.addr()).unwrap());
                (0, len)
            }
            (1, Some(found)) => {
                data.iter().for_each(|part| memory.read_slice(found, part.addr()).unwrap());
                (0, 0)
            }
            (4, _) => (0, 0),
            _ => (2, 0),
        };
        memory.write_obj(result, status.addr()).unwrap();
        u32::try_from(written + 1).unwrap()
    }

    fn serve(&mut self, ring: &VringMutex) {
        let memory = self.memory.memory();
        let chains: Vec<_> = ring.get_mut().get_queue_mut().iter(memory).unwrap().collect();
        for chain in chains {
            let head = chain.head_index();
            let written = self.execute(chain);
            ring.add_used(head, written).unwrap();
        }
        if ring.needs_notification().unwrap() {
            ring.signal_used_queue().unwrap();
        }
    }
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let capacity = (BYTES / SECTOR) as u64;
        capacity.to_le_bytes().into_iter().skip(offset as usize).take(size as usize).collect()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Else its threads would outlive the daemon, which waits for them.
        new_event_consumer_and_notifier(EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&mut self, _event: u16, _set: EventSet, rings: &[VringMutex], _thread: usize) -> io::Result<()> {
        loop {
            rings[0].disable_notification().unwrap();
            self.serve(&rings[0]);
            if !rings[0].enable_notification().unwrap() {
                return Ok(());
            }
        }
    }
}

fn with_reference(conversation: impl FnOnce(&Path) -> Vec<String>) -> Vec<String> {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let mut listener = Listener::new(&path, true).unwrap();
    let daemon = std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let disk = Disk { memory: memory.clone(), event_idx: false, data: vec![0; BYTES] };
        let mut daemon = VhostUserDaemon::new("reference".into(), Arc::new(RwLock::new(disk)), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        // How it ends is the daemon's own affair.
        let _ended = daemon.wait();
    });
    let transcript = conversation(&path);
    daemon.join().unwrap();
    transcript
}

/// Bytes that tell where they were written.
fn pattern(sector: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| ((sector + i / 512).wrapping_mul(37) + i).to_le_bytes()[0]).collect()
}

/// Keeps the ring full of `requests`, each with a pattern as its data, and notes how each ends.
fn hold(client: &mut Client, requests: &[Request], transcript: &mut Vec<String>) {
    let ring = &mut client.rings[0];
    let (mut next, mut running) = (requests.iter().enumerate(), std::collections::HashMap::new());
    let mut answers = vec![String::new(); requests.len()];
    loop {
        while ring.has_room()
            && let Some((n, request)) = next.next()
        {
            let slot = ring.submit(*request);
            match *request {
                Request::Write { sector, bytes } => ring.set_data(slot, &pattern(sector, bytes)),
                Request::Read { bytes, .. } => ring.set_data(slot, &vec![0xcc; bytes]),
                Request::Flush => {}
            }
            running.insert(slot, n);
        }
        ring.publish();
        if running.is_empty() {
            break;
        }
        let done = ring.wait(LIMIT).unwrap().expect("a request ends in bounded time");
        let n = running.remove(&done.slot).unwrap();
        let mut data = Vec::new();
        if let Request::Read { bytes, .. } = requests[n] {
            data.resize(bytes, 0);
            ring.data(done.slot, &mut data);
        }
        let sum = data.iter().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
        answers[n] = format!("{:?}: {} {} {sum:x}", requests[n], done.status, done.written);
    }
    transcript.extend(answers);
}

fn conversation(path: &Path, shape: Shape) -> Vec<String> {
    let mut client = Client::connect(path, shape).unwrap();
    let mut transcript = vec![format!("{} sectors", client.capacity())];
    let places = (0..200).map(|n| (n * 8 * 37 % 16_384, [512, 4096, 65536][usize::try_from(n).unwrap() % 3]));
    let places: Vec<(u64, usize)> = places.collect();
    let writes: Vec<_> = places.iter().map(|&(sector, bytes)| Request::Write { sector, bytes }).collect();
    // One at a time, since some overlap.
    writes.iter().for_each(|write| hold(&mut client, &[*write], &mut transcript));
    hold(&mut client, &[Request::Flush], &mut transcript);
    let reads: Vec<_> = places.iter().map(|&(sector, bytes)| Request::Read { sector, bytes }).collect();
    hold(&mut client, &reads, &mut transcript);
    let end = client.capacity();
    for sector in [end - 1, end, u64::from(u32::MAX)] {
        hold(&mut client, &[Request::Read { sector, bytes: 1024 }], &mut transcript);
        hold(&mut client, &[Request::Write { sector, bytes: 1024 }], &mut transcript);
    }
    transcript
}

#[test]
fn the_same_requests_get_the_same_answers_on_every_kind_of_ring() {
    let reference = with_reference(|path| conversation(path, Shape::default()));
    assert!(reference.iter().filter(|line| line.contains(": 1 1 ")).count() == 6, "{reference:#?}");
    for shape in Shape::default().kinds() {
        let rig = Rig::new();
        assert_eq!(conversation(&rig.path, shape), reference, "ours, {shape:?}");
        if !shape.packed {
            assert_eq!(with_reference(|path| conversation(path, shape)), reference, "the reference, {shape:?}");
        }
    }
}
