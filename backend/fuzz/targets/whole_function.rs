//! A vfio-user client that says anything, after a version or without one. The server answers or hangs up, and nothing stays
//! mapped for the device.
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
    let (ours, theirs) = front_end::conversation();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let server = std::thread::spawn(move || {
        let (machine, device) = machine();
        Server::new(Listen::Fd(theirs).open().unwrap(), device, Vmm::without_shim()).run(&stop).unwrap();
        assert!(machine.iommu().mapped().is_empty(), "something stays mapped");
    });
    front_end::say(&ours, input);
    server.join().unwrap();
});
