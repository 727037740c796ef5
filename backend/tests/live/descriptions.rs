//! What a successor refuses, and what a predecessor cannot do meanwhile. Both are this process.

use vhost_device_vfio::acquire::hand_over::{FunctionDescription, accept};
use vhost_device_vfio::coherency::{Personality, Policy};
use vhost_device_vfio::hardware::{AddressSpace, Function, MapError};

use super::super::{MIB, page};
use super::{acquire, guest_memory, new_file, pinned_pages, policy, served};

/// What is wrong in a description, and what the error says. The device is attached and has memory mapped.
type Lie = (fn(&mut FunctionDescription), &'static str);
const LIES: [Lie; 9] = [
    (|d| d.address = "../0000:00:04.0".to_owned(), "is not the name of a function"),
    (|d| d.address = "0000:00:00.0".to_owned(), "no character device"),
    (|d| d.space.ioas = d.space.page_table, "look up the address space: No such file"),
    (|d| d.space.device = d.space.ioas, "look up the device: No such file"),
    (|d| d.space.page_table = d.space.device, "look up the page table: No such file"),
    (|d| d.space.regions[0].range.start += MIB, "is not mapped as it says"),
    (|d| d.space.buffers[0].len += page(), "is not mapped as it says"),
    (|d| d.space.window = d.space.regions[0].range, "overlaps"),
    (
        |d| d.facts.policy = if d.facts.policy == Policy::Assume { Policy::Allow } else { Policy::Assume },
        "and would now be",
    ),
];

#[test]
fn a_description_that_the_kernel_does_not_confirm_is_refused_and_changes_nothing() {
    let (function, space, facts) = acquire();
    let enforced = facts.snoop_enforced;
    let region = guest_memory(new_file(4 * MIB), 4 * MIB);
    space.add(&region).unwrap();
    let buffer = space.buffer(4096).unwrap();
    let served = served(&function, &space, &facts);
    let exported = served.export(true).unwrap();
    let before = pinned_pages();
    let ours = || exported.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
    let attempt = |description: &FunctionDescription, fds| {
        accept(description, fds, (Personality::Mediated, policy(), false)).map(drop).map_err(|error| error.to_string())
    };

    for (lie, why) in LIES {
        let mut description = exported.description().clone();
        lie(&mut description);
        // An IOMMU that enforces snooping leaves no choice.
        let harmless = enforced && why == "and would now be";
        match attempt(&description, ours()) {
            Ok(()) => assert!(harmless, "{why}: accepted"),
            Err(error) => assert!(error.contains(why), "wanted: {why}; found: {error}"),
        }
    }
    let [device_file, iommufd] = ours();
    let swapped = attempt(exported.description(), [iommufd, device_file]).unwrap_err();
    assert!(swapped.contains("not an open /dev/iommu"), "{swapped}");
    let [_, iommufd] = ours();
    let another = attempt(exported.description(), [new_file(4096).try_clone().unwrap().into(), iommufd]).unwrap_err();
    assert!(another.contains("it is the device"), "{another}");
    function.set_bus_master(true).unwrap();
    let running = attempt(exported.description(), ours()).unwrap_err();
    assert!(running.contains("bus master is on"), "{running}");
    function.set_bus_master(false).unwrap();

    attempt(exported.description(), ours()).expect("the true description is accepted");
    assert_eq!(pinned_pages(), before, "pages pinned");
    exported.take_back().unwrap();
    drop(buffer);
    space.remove(&region).unwrap();
}

#[test]
fn nothing_can_be_mapped_while_a_space_is_handed_over() {
    let (function, space, facts) = acquire();
    let served = served(&function, &space, &facts);
    let region = guest_memory(new_file(4 * MIB), 4 * MIB);
    let exported = served.export(true).unwrap();

    assert!(matches!(space.add(&region), Err(MapError::HandOver { .. })));
    assert!(matches!(space.buffer(4096), Err(MapError::HandOver { .. })));
    drop(exported);

    drop(space.buffer(4096).unwrap());
    space.add(&region).unwrap();
    space.remove(&region).unwrap();
}
