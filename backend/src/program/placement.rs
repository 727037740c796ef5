//! Where the workers run, from the command line and sysfs. See the library's `placement`.

use anyhow::{Context, Result};

use vhost_device_vfio::config::Config;
use vhost_device_vfio::placement::{Choice, Facts, Node, Placement, choose, own, permitted};
use vhost_device_vfio::sys::PreferredNode;
use vhost_device_vfio::vfio::PciAddress;

/// The workers' CPUs. While it lives, memory is taken from the drive's node: the driver's queues, the workers' buffers and stacks.
pub(crate) struct Placed {
    pub(crate) placement: Placement,
    _memory: Option<PreferredNode>,
}

/// Fails if `--cpus` names no CPU that can be used. To be called before anything is opened, and before another process is asked to
/// hand over.
///
/// # Errors
/// None of the CPUs can be used.
pub(crate) fn check(config: &Config) -> Result<()> {
    if config.cpus.is_some() {
        choose(&facts(config, None)?)?;
    }
    Ok(())
}

/// Decides for the workers of the function `name`, which sysfs knows if it is a PCI address. To be called before the driver
/// allocates its queues.
///
/// # Errors
/// As for [`check`].
pub(crate) fn place(config: &Config, name: &str) -> Result<Placed> {
    let address = name.parse::<PciAddress>().ok();
    let node = address.and_then(|address| Node::of_device(&address.sysfs()));
    let facts = match facts(config, node) {
        Ok(facts) => facts,
        Err(error) if config.cpus.is_none() => {
            log::warn!("{name}: workers run where this process does: {error:#}");
            return Ok(Placed { placement: Placement::default(), _memory: None });
        }
        Err(error) => return Err(error),
    };
    let choice = choose(&facts)?;
    match choice {
        Choice::NotOnNode(..) => log::warn!("{name}: {choice}"),
        // Where an emulated drive is does not matter.
        Choice::NoNode(_) if address.is_none() => {}
        _ => log::info!("{name}: {choice}"),
    }
    Ok(Placed { placement: choice.placement(), _memory: node.and_then(|node| prefer(name, node.number)) })
}

fn facts(config: &Config, node: Option<Node>) -> Result<Facts> {
    let own = own().context("read the CPUs of this process (sched_getaffinity)")?;
    let permitted = match config.cpus {
        Some(_) => permitted().context("--cpus: ask for the CPUs that this process may use (sched_setaffinity)")?,
        None => own,
    };
    Ok(Facts { list: config.cpus, permitted, own, node })
}

/// Memory of another node works, too, so failure is not an error.
fn prefer(name: &str, node: u32) -> Option<PreferredNode> {
    PreferredNode::enter(node).unwrap_or_else(|error| {
        log::info!("{name}: memory is not taken from NUMA node {node}: set_mempolicy: {error}");
        None
    })
}
