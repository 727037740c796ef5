//! A controller with arbitrary Identify data, taken from the input. The driver must either refuse it with an error or
//! report a valid disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_device_vfio::driver::Driver;
use vhost_device_vfio::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use vhost_device_vfio::emulated::{AnaState, Fault, Machine, Medium, Options, Traits};

fuzz_target!(|input: &[u8]| {
    // Everything that is asked: descriptors of the namespace, state of the path, limits.
    let traits = Traits { ana: Some(AnaState::Optimized), ..Traits::default() };
    let options =
        Options { size: 1 << 20, medium: Medium::Null, command_set: Some(0), traits, ..Options::default() };
    let machine = Machine::new(options).unwrap();
    // The input is a list of patches: CNS, offset (16 bits), length, bytes.
    let mut rest = input;
    while let [cns, low, high, len, more @ ..] = rest {
        let (bytes, after) = more.split_at(more.len().min((*len).into()));
        let offset = usize::from(u16::from_le_bytes([*low, *high])) % 4096;
        machine.inject(Fault::Identify { cns: cns % 7, offset, bytes: bytes.to_vec() });
        rest = after;
    }
    let options = NvmeOptions {
        namespaces: Vec::new(),
        queues: 1,
        read_only: false,
        interrupts: InterruptPolicy::Auto,
        avoid: Vec::new(),
    };
    if let Ok(mut nvme) = Nvme::bring_up(machine.function(), machine.space(), options) {
        let geometry = nvme.geometry();
        assert!(matches!(geometry.block_size, 512 | 4096) && geometry.blocks > 0, "{geometry:?}");
        assert!(geometry.blocks.checked_mul(geometry.block_size.into()).is_some(), "{geometry:?}");
        assert!(geometry.physical_block_size.is_power_of_two(), "{geometry:?}");
        drop(nvme.take_queues());
        nvme.shut_down();
    }
    assert_eq!(machine.iommu().fault_count(), 0, "DMA to an unmapped address");
});
