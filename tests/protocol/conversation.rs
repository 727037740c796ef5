//! Sends the same requests to the server and to a reference, a disk in memory built on rust-vmm's `vhost-user-backend` and
//! `virtio-queue`, and compares the results. So the test client and the server agree with an independent implementation of
//! the specification. The reference has no packed rings; those are compared with split ones.

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

/// Time-out of a request.
const LIMIT: Duration = Duration::from_secs(20);
/// Size of the disk of [`Rig`].
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
    /// Executes the request of one chain. Returns the number of bytes written to the chain.
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
        // Without it the daemon's threads would not exit, and the daemon would wait for them.
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

fn with_reference(test: impl FnOnce(&Path) -> Vec<String>) -> Vec<String> {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let mut listener = Listener::new(&path, true).unwrap();
    let daemon = std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let disk = Disk { memory: memory.clone(), event_idx: false, data: vec![0; BYTES] };
        let mut daemon = VhostUserDaemon::new("reference".into(), Arc::new(RwLock::new(disk)), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        // An error here is not that of the test.
        let _result = daemon.wait();
    });
    let transcript = test(&path);
    daemon.join().unwrap();
    transcript
}

/// Bytes that depend on their position on the disk.
fn pattern(sector: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| ((sector + i / 512).wrapping_mul(37) + i).to_le_bytes()[0]).collect()
}

/// Executes `requests`, as many at a time as fit into the ring, and appends their results to `transcript`.
fn execute(client: &mut Client, requests: &[Request], transcript: &mut Vec<String>) {
    let ring = &mut client.rings[0];
    let (mut next, mut running) = (requests.iter().enumerate(), std::collections::HashMap::new());
    let mut results = vec![String::new(); requests.len()];
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
        results[n] = format!("{:?}: {} {} {sum:x}", requests[n], done.status, done.written);
    }
    transcript.extend(results);
}

fn run_requests(path: &Path, shape: Shape) -> Vec<String> {
    let mut client = Client::connect(path, shape).unwrap();
    let mut transcript = vec![format!("{} sectors", client.capacity())];
    let places = (0..200).map(|n| (n * 8 * 37 % 16_384, [512, 4096, 65536][usize::try_from(n).unwrap() % 3]));
    let places: Vec<(u64, usize)> = places.collect();
    let writes: Vec<_> = places.iter().map(|&(sector, bytes)| Request::Write { sector, bytes }).collect();
    // One at a time, since some overlap.
    writes.iter().for_each(|write| execute(&mut client, &[*write], &mut transcript));
    execute(&mut client, &[Request::Flush], &mut transcript);
    let reads: Vec<_> = places.iter().map(|&(sector, bytes)| Request::Read { sector, bytes }).collect();
    execute(&mut client, &reads, &mut transcript);
    let end = client.capacity();
    for sector in [end - 1, end, u64::from(u32::MAX)] {
        execute(&mut client, &[Request::Read { sector, bytes: 1024 }], &mut transcript);
        execute(&mut client, &[Request::Write { sector, bytes: 1024 }], &mut transcript);
    }
    transcript
}

#[test]
fn the_same_requests_have_the_same_results_on_every_kind_of_ring() {
    let reference = with_reference(|path| run_requests(path, Shape::default()));
    assert!(reference.iter().filter(|line| line.contains(": 1 1 ")).count() == 6, "{reference:#?}");
    for shape in Shape::default().kinds() {
        let rig = Rig::new();
        assert_eq!(run_requests(&rig.path, shape), reference, "ours, {shape:?}");
        if !shape.packed {
            assert_eq!(with_reference(|path| run_requests(path, shape)), reference, "the reference, {shape:?}");
        }
    }
}
