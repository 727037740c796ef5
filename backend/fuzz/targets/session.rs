//! A vhost-user front-end that sends arbitrary bytes and descriptors. The server must reply or close the connection.
#![no_main]

mod front_end;

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use vhost_device_vfio::addr::IovaSlice;
use vhost_device_vfio::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use vhost_device_vfio::emulated::{Machine, Medium, Options};
use vhost_device_vfio::engine::{self, Engine};
use vhost_device_vfio::kvm::Vmm;
use vhost_device_vfio::socket::Listen;
use vhost_device_vfio::vhost_user::{Device, Server, VirtioFeatures};

fn device() -> Device {
    let options = Options { size: 1 << 20, medium: Medium::Null, ..Options::default() };
    let machine = Machine::new(options).unwrap();
    let space = machine.space();
    let options = NvmeOptions {
        namespaces: Vec::new(),
        queues: 2,
        read_only: false,
        interrupts: InterruptPolicy::Auto,
        avoid: Vec::new(),
    };
    let nvme = Nvme::bring_up(machine.function(), Arc::clone(&space), options).unwrap();
    let options = engine::Options {
        rings: 2,
        spin: Duration::ZERO,
        drain_timeout: Duration::from_secs(5),
        watch: engine::WatchdogOptions::default(),
        placement: Default::default(),
    };
    let engine = Engine::start(Box::new(nvme), &space, options).unwrap();
    let withheld = VirtioFeatures::empty();
    Device { engine, space, slice: IovaSlice::WHOLE, queues: 2, vmm: Vmm::without_shim(), withheld }
}

fuzz_target!(|input: &[u8]| {
    let (ours, theirs) = front_end::connect();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let server = std::thread::spawn(move || {
        let mut server = Server::new(Listen::Fd(theirs).open().unwrap(), device()).unwrap();
        server.run(stop).unwrap();
        server.into_device().engine.shut_down();
    });
    front_end::send_input(&ours, input);
    server.join().unwrap();
});
