//! Barriers between ordinary memory and a device.
//!
//! Rust's fences and atomics order what CPUs see of each other: on Arm they are `dmb ish` and its kin, for the Inner Shareable
//! domain. A device is an observer outside that domain, so its barriers are those for the Outer Shareable domain, as in Linux's
//! `dma_wmb`, `dma_rmb`, `writel` and `readl` (Documentation/memory-barriers.txt, "KERNEL I/O BARRIER EFFECTS").
//!
//! On x86 both cost nothing. Stores, and loads before stores, keep their order there, and a register is uncached, so that a store
//! to it also waits for the stores before it.

/// Before a store to a register: the device sees every earlier store of this thread to memory, and every earlier load has been
/// done. So it finds the entries that a doorbell announces, and overwrites none that is still being read.
#[inline]
pub(super) fn before_register_store() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier touches no memory.
    unsafe {
        std::arch::asm!("dmb osh", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "x86_64")]
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// After a load of what a device has stored, in a register or in memory: later loads of this thread see everything that the
/// device had stored before, and later stores come after the load.
#[inline]
pub(super) fn after_device_load() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier touches no memory.
    unsafe {
        std::arch::asm!("dmb oshld", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "x86_64")]
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
