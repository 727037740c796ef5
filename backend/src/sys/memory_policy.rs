//! From which NUMA node the kernel takes the memory that a thread is the first to touch (set_mempolicy(2)). Memory that is pinned
//! for a device counts as touched by the thread that has it pinned.

use std::io;
use std::marker::PhantomData;
use std::ptr;

/// Bits of a mask of nodes; the kernel has at most 1024 (`CONFIG_NODES_SHIFT`).
const NODES: usize = 1024;

/// While it lives, this thread and those that it starts take their memory from one node if that has some. Those that it started
/// go on so afterwards.
#[derive(Debug)]
pub struct PreferredNode {
    /// The policy is that of a thread.
    _of_thread: PhantomData<*const ()>,
}

impl PreferredNode {
    /// Prefers `node`. `None` if this thread has a policy already, such as one of `numactl` or `NUMAPolicy=`, which stays.
    ///
    /// # Errors
    /// There is no such node, or it is not in this process's cpuset, or a filter of system calls forbids it.
    pub fn enter(node: u32) -> io::Result<Option<Self>> {
        let mut mode: libc::c_int = libc::MPOL_DEFAULT;
        let (no_mask, no_address) = (ptr::null_mut::<libc::c_ulong>(), ptr::null_mut::<libc::c_void>());
        // SAFETY: the kernel writes one int to `mode`, which outlives the call, and nothing to a null mask of 0 bits.
        check(unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, no_mask, 0_usize, no_address, 0_usize) })?;
        if mode != libc::MPOL_DEFAULT {
            return Ok(None);
        }
        let node = usize::try_from(node).unwrap_or(NODES);
        let bits = libc::c_ulong::BITS as usize;
        let mut mask = [0 as libc::c_ulong; NODES / libc::c_ulong::BITS as usize];
        let word = mask.get_mut(node / bits).ok_or(io::ErrorKind::InvalidInput)?;
        *word = 1 << (node % bits);
        // The kernel takes one bit less than it is told (get_nodes in mm/mempolicy.c).
        // SAFETY: the kernel reads `NODES` bits of `mask`, which has as many and outlives the call.
        check(unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_PREFERRED, mask.as_ptr(), NODES + 1) })?;
        Ok(Some(Self { _of_thread: PhantomData }))
    }
}

impl Drop for PreferredNode {
    fn drop(&mut self) {
        let no_mask = ptr::null::<libc::c_ulong>();
        // SAFETY: the kernel reads nothing from a null mask of 0 bits.
        let set = check(unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_DEFAULT, no_mask, 0_usize) });
        if let Err(error) = set {
            log::warn!("memory goes on to be taken from the drive's NUMA node: set_mempolicy: {error}");
        }
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The policy of the calling thread, as numa_maps(5) has it for its memory.
    fn policy() -> String {
        let maps = std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap();
        maps.lines().find(|line| line.contains("stack")).unwrap().split(' ').nth(1).unwrap().to_owned()
    }

    #[test]
    fn a_node_is_preferred_until_the_guard_is_dropped_and_a_policy_that_is_there_stays() {
        if !std::fs::exists("/proc/thread-self/numa_maps").unwrap() {
            return; // a kernel without NUMA
        }
        let entered = PreferredNode::enter(0).unwrap().expect("no policy yet");
        assert_eq!(policy(), "prefer:0");
        assert!(PreferredNode::enter(0).unwrap().is_none(), "it has one");
        drop(entered);
        assert_eq!(policy(), "default");
    }

    #[test]
    fn a_node_that_does_not_exist_is_an_error_and_changes_nothing() {
        for node in [1023, 1024, u32::MAX] {
            assert!(PreferredNode::enter(node).is_err(), "{node}");
        }
    }
}
