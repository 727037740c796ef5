//! Sends the same messages to the server and to a daemon built on rust-vmm's `vhost-user-backend`, and compares the replies.

use std::fmt::Debug;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, RwLock};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use crate::rig::{QUEUES, Rig, memory};
use crate::rings::{AVAIL, DESC, RAM, USED};
use crate::wire::{FEATURES, MemoryRegion, OFFERED, PROTOCOL};

/// The reference does not know SET_STATUS.
const STATUS: u64 = 1 << 16;

/// The reference: a device with the features and configuration of the server. It does not access its rings.
struct Reference {
    features: u64,
    config: Vec<u8>,
}

impl VhostUserBackendMut for Reference {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES.into()
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::from_bits_retain(OFFERED & !STATUS)
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let zeros = std::iter::repeat(0);
        self.config.iter().copied().chain(zeros).skip(offset as usize).take(size as usize).collect()
    }

    fn update_memory(&mut self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without it the daemon's threads would not exit, and the daemon would wait for them.
        new_event_consumer_and_notifier(EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&mut self, _event: u16, _set: EventSet, _rings: &[VringRwLock], _thread: usize) -> io::Result<()> {
        Ok(())
    }
}

/// Runs `test` with the reference.
fn with_reference<T>(reference: Reference, test: impl FnOnce(&Path) -> T) -> T {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let mut listener = Listener::new(&path, true).unwrap();
    let daemon = std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("reference".into(), Arc::new(RwLock::new(reference)), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        // An error here is not that of the test.
        let _result = daemon.wait();
    });
    let result = test(&path);
    daemon.join().unwrap();
    result
}

/// The results of all messages so far. Error texts are left out.
struct Transcript(Vec<String>);

impl Transcript {
    fn record<T: Debug, E>(&mut self, message: &str, result: Result<T, E>) {
        self.0.push(match result {
            Ok(value) => format!("{message}: {value:?}"),
            Err(_) => format!("{message}: refused"),
        });
    }
}

fn connect(path: &Path) -> Frontend {
    let front_end = Frontend::connect(path, 8).unwrap();
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front_end
}

fn negotiate(front_end: &mut Frontend, transcript: &mut Transcript) {
    transcript.record("features", front_end.get_features());
    transcript.record("protocol features", front_end.get_protocol_features().map(|bits| bits.bits() & !STATUS));
    let protocol = VhostUserProtocolFeatures::from_bits_retain(PROTOCOL & !STATUS);
    transcript.record("set protocol features", front_end.set_protocol_features(protocol));
    transcript.record("queues", front_end.get_queue_num());
    transcript.record("slots", front_end.get_max_mem_slots());
    transcript.record("owner", front_end.set_owner());
    transcript.record("set features", front_end.set_features(FEATURES));
}

fn region(place: MemoryRegion, file: &impl AsRawFd) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: place.gpa,
        memory_size: place.len,
        userspace_addr: place.qva,
        mmap_offset: place.offset,
        mmap_handle: file.as_raw_fd(),
    }
}

fn ring_addresses(flags: u32) -> VringConfigData {
    VringConfigData {
        queue_max_size: 1024,
        queue_size: 8,
        flags,
        desc_table_addr: RAM.qva + DESC,
        used_ring_addr: RAM.qva + USED,
        avail_ring_addr: RAM.qva + AVAIL,
        log_addr: None,
    }
}

fn set_ring_up(front_end: &mut Frontend, transcript: &mut Transcript) {
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    transcript.record("num", front_end.set_vring_num(0, 8));
    transcript.record("base", front_end.set_vring_base(0, 0));
    transcript.record("addr", front_end.set_vring_addr(0, &ring_addresses(0)));
    transcript.record("kick", front_end.set_vring_kick(0, &kick));
    transcript.record("call", front_end.set_vring_call(0, &call));
    transcript.record("enable", front_end.set_vring_enable(0, true));
}

/// The messages of QEMU from its connection to the second start of its guest, with memory hotplug.
fn whole_session(path: &Path) -> Vec<String> {
    let (mut front_end, mut transcript) = (connect(path), Transcript(Vec::new()));
    let (ram, dimm) = (memory("ram", RAM.len), memory("dimm", 1 << 20));
    let second = MemoryRegion { gpa: 1 << 32, len: 1 << 20, qva: 1 << 45, offset: 0 };
    negotiate(&mut front_end, &mut transcript);
    for index in 0..2 {
        transcript.record("call", front_end.set_vring_call(index, &EventFd::new(0).unwrap()));
        transcript.record("err", front_end.set_vring_err(index, &EventFd::new(0).unwrap()));
    }
    for (offset, size) in [(0, 57), (0, 60), (20, 4), (59, 5), (200, 10)] {
        let config = front_end.get_config(offset, size, VhostUserConfigFlags::empty(), &vec![0; size as usize]);
        transcript.record("config", config.map(|(_, bytes)| bytes));
    }
    transcript.record("reset", front_end.reset_device());
    transcript.record("reset", front_end.reset_device());
    transcript.record("set features", front_end.set_features(FEATURES));
    transcript.record("add", front_end.add_mem_region(&region(RAM, &ram)));
    for _ in 0..2 {
        set_ring_up(&mut front_end, &mut transcript);
        transcript.record("enable unused", front_end.set_vring_enable(1, true));
        transcript.record("add", front_end.add_mem_region(&region(second, &dimm)));
        transcript.record("remove", front_end.remove_mem_region(&region(second, &dimm)));
        transcript.record("base of 0", front_end.get_vring_base(0));
        transcript.record("base of 1", front_end.get_vring_base(1));
        transcript.record("disable", front_end.set_vring_enable(0, false));
    }
    transcript.record("table", front_end.set_mem_table(&[region(RAM, &ram), region(second, &dimm)]));
    transcript.record("remove", front_end.remove_mem_region(&region(RAM, &ram)));
    transcript.0
}

type Mistake = fn(&mut Frontend) -> vhost::Result<()>;

/// Messages that both refuse. Each has its own connection, because the reference disconnects after a refusal.
const MISTAKES: [(&str, Mistake); 7] = [
    ("a feature not offered", |front_end| front_end.set_features(FEATURES | 1 << 40)),
    ("no size", |front_end| front_end.set_vring_num(0, 0)),
    ("too large", |front_end| front_end.set_vring_num(0, 4096)),
    ("no such ring", |front_end| front_end.set_vring_num(7, 8)),
    ("no such ring to enable", |front_end| front_end.set_vring_enable(7, true)),
    ("no such region", |front_end| front_end.remove_mem_region(&region(RAM, &-1))),
    ("overlap", |front_end| {
        let ram = memory("ram", RAM.len);
        front_end.add_mem_region(&region(RAM, &ram))?;
        front_end
            .add_mem_region(&region(MemoryRegion { gpa: RAM.gpa + 0x1000, qva: 1 << 30, len: 0x1000, offset: 0 }, &ram))
            .map(drop)
    }),
];

/// A reference that offers what `rig` offers.
fn reference_of(rig: &Rig) -> Reference {
    let mut front_end = connect(&rig.path);
    negotiate(&mut front_end, &mut Transcript(Vec::new()));
    let config = front_end.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap().1;
    Reference { features: front_end.get_features().unwrap(), config }
}

#[test]
fn a_whole_session_has_the_same_replies() {
    let rig = Rig::new();
    let theirs = with_reference(reference_of(&rig), whole_session);
    let ours = whole_session(&rig.path);
    assert_eq!(ours, theirs);
    assert!(!ours.iter().any(|line| line.ends_with("refused")), "{ours:#?}");
}

#[test]
fn the_same_mistakes_are_refused() {
    let rig = Rig::new();
    for (name, mistake) in MISTAKES {
        let is_refused = |path: &Path| {
            let mut front_end = connect(path);
            negotiate(&mut front_end, &mut Transcript(Vec::new()));
            mistake(&mut front_end).is_err()
        };
        assert!(with_reference(reference_of(&rig), is_refused), "the reference, {name}");
        assert!(is_refused(&rig.path), "{name}");
    }
}
