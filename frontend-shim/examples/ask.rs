//! Asks the shim in a VM for its status, or registers a device while this program runs:
//!
//! ```text
//! ask /run/vm1/kvm.sock                                   one line: the VM, the policy, KVM's answer
//! ask /run/vm1/kvm.sock coherent                          no discards until standard input ends
//! ask /run/vm1/kvm.sock /dev/vfio/devices/vfio0           the same, and non-coherent DMA is registered with KVM
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;

use kvm_vfio_shim::{Client, ClientError, Status};

fn show(status: &Status) {
    let dma = if status.non_coherent() { "non-coherent" } else { "coherent" };
    let Status { vmm_pid, vms, policy, started_ms, registered, told, kept } = status;
    println!(
        "pid={vmm_pid} vms={vms} policy={policy} started_ms={started_ms} registered={registered} told={told} kept={kept} dma={dma}"
    );
}

fn ask(socket: &Path, device: Option<&str>) -> Result<(), ClientError> {
    let (mut client, status) = Client::connect(socket, Client::DEFAULT_TIMEOUT)?;
    let Some(device) = device else {
        show(&status);
        return Ok(());
    };
    let registration = if device == "coherent" {
        client.register_coherent()?
    } else {
        // Never bound to an iommufd: it gives the VMM no right to the device.
        let file = File::options().read(true).write(true).open(device);
        let file = file.unwrap_or_else(|error| panic!("{device}: {error}"));
        client.register_non_coherent(&file)?
    };
    show(&registration.status);
    // An error ends the wait as well.
    _ = io::stdin().read(&mut [0; 1]);
    show(&client.unregister(registration.handle)?);
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, device @ ..] = &arguments[..] else {
        eprintln!("usage: ask SOCKET [coherent | DEVICE]");
        return ExitCode::from(2);
    };
    match ask(socket.as_ref(), device.first().map(String::as_str)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
