//! A vfio-user client that sends arbitrary bytes and descriptors, with or without a version message first. The server must
//! reply or close the connection, and must leave nothing mapped for the device.
#![no_main]

mod front_end;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use vhost_device_vfio::coherency::{Facts, Personality, Policy};
use vhost_device_vfio::emulated::{Machine, Medium, Options};
use vhost_device_vfio::kvm::Vmm;
use vhost_device_vfio::passthrough::{BarAccess, Passthrough};
use vhost_device_vfio::vfio_user::Server;
use vhost_device_vfio::socket::Listen;

fn machine() -> (Machine, Passthrough) {
    let machine = Machine::new(Options { size: 1 << 20, medium: Medium::Null, ..Options::default() }).unwrap();
    let facts = machine.facts(Policy::Suppress).unwrap();
    let facts = Facts { personality: Personality::WholeFunction, shim: true, ..facts };
    let device = Passthrough::new(machine.whole_function(), machine.space(), BarAccess::Direct, facts, false).unwrap();
    (machine, device)
}

fuzz_target!(|input: &[u8]| {
    let (ours, theirs) = front_end::connect();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let server = std::thread::spawn(move || {
        let (machine, device) = machine();
        Server::new(Listen::Fd(theirs).open().unwrap(), device, Vmm::without_shim()).run(&stop).unwrap();
        assert!(machine.iommu().mapped().is_empty(), "memory is still mapped");
    });
    front_end::send_input(&ours, input);
    server.join().unwrap();
});
