//! Write-back and invalidation of CPU cache lines, from user space.
//!
//! Only write-back-and-*invalidate* instructions are used. A plain write-back is enough before a device reads. It is wrong
//! after a device has written, because it keeps the line. On the processors measured it is no faster than CLFLUSHOPT.
//! The instructions work by address on the whole coherence domain, from any CPU. They fault like a load, so the range must
//! be mapped; a [`SharedMemory`] always is.
//!
//! On Arm they work to the point of coherency, where everything that accesses memory sees the same, devices that do not snoop
//! included. Only a DSB waits until they are complete, and only that of the full system waits for observers outside the CPUs'
//! shareability domain.

use super::SharedMemory;
use crate::hardware::CacheFlush;

/// The instruction this CPU has, and the size of its cache lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLines {
    instruction: Instruction,
    line: usize,
    granule: u64,
}

/// A write-back-and-invalidate instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// x86: unordered, so many flushes can be in flight.
    ClflushOpt,
    /// x86: flushes are ordered one after the other.
    Clflush,
    /// Arm: clean and invalidate by address to the point of coherency.
    DcCivac,
}

impl CacheLines {
    /// Detects the instruction with CPUID. `None` if user space has none.
    #[cfg(target_arch = "x86_64")]
    #[must_use]
    pub fn detect() -> Option<Self> {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // Intel SDM vol. 2A, CPUID: leaf 1 EDX[19] CLFSH, EBX[15:8] line size in quadwords; leaf 7 EBX[23] CLFLUSHOPT.
        let basic = __cpuid(1);
        let line = ((basic.ebx >> 8) & 0xff) as usize * 8;
        if basic.edx & (1 << 19) == 0 || line == 0 {
            return None;
        }
        let opt = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ebx & (1 << 23) != 0;
        let instruction = if opt { Instruction::ClflushOpt } else { Instruction::Clflush };
        Some(Self { instruction, line, granule: LEAST_GRANULE })
    }

    /// Reads the line size. Linux allows user space the instruction on every arm64 machine (`SCTLR_EL1.UCI`).
    #[cfg(target_arch = "aarch64")]
    #[must_use]
    pub fn detect() -> Option<Self> {
        let ctr: u64;
        // SAFETY: reads a register that Linux makes readable in user space (`SCTLR_EL1.UCT`), or emulates.
        unsafe { std::arch::asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) };
        Some(Self::from_ctr(ctr))
    }

    /// CTR_EL0 (Arm ARM): DminLine [19:16] is the log2 of the smallest data cache line, CWG [27:24] that of the cache write-back
    /// granule, both in words of four bytes. Lines of the CPUs of one machine can differ, so that the granule is larger. If it
    /// is 0, the largest that the architecture allows has to be assumed.
    #[cfg(any(target_arch = "aarch64", test))]
    fn from_ctr(ctr: u64) -> Self {
        let field = |at: u32| (ctr >> at) & 0xf;
        let granule = if field(24) == 0 { ARM_MAX_GRANULE } else { 4 << field(24) };
        Self { instruction: Instruction::DcCivac, line: 4 << field(16), granule: granule.max(LEAST_GRANULE) }
    }

    /// Always `None`: no instruction is known for this architecture.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[must_use]
    pub fn detect() -> Option<Self> {
        None
    }

    /// The instruction that [`Self::flush`] uses.
    #[must_use]
    pub fn instruction(&self) -> Instruction {
        self.instruction
    }

    /// Cache line size in bytes.
    #[must_use]
    pub fn line(&self) -> usize {
        self.line
    }

    /// Writes back and invalidates every line that overlaps the `len` bytes at `offset`. On return, DRAM holds all earlier
    /// CPU writes, and the next CPU read comes from DRAM.
    ///
    /// # Panics
    /// If the range is not inside `shared`.
    pub fn flush(&self, shared: &SharedMemory, offset: usize, len: usize) {
        assert!(offset <= shared.len() && len <= shared.len() - offset, "{len} bytes at {offset} of {shared:?}");
        if len == 0 {
            return;
        }
        let first = usize::try_from(shared.host_address()).expect("a 64-bit address") + offset;
        barrier();
        let mut line = first & !(self.line - 1);
        while line < first + len {
            // SAFETY: the line holds at least one byte of `shared`, which keeps its memory mapped.
            unsafe { flush_line(self.instruction, line) };
            line += self.line;
        }
        barrier();
    }
}

/// The least that [`CacheFlush::granule`] returns, bytes: many processors fetch their lines of 64 bytes in pairs.
const LEAST_GRANULE: u64 = 128;
/// The largest granule of the Arm architecture, bytes: 512 words.
#[cfg(any(target_arch = "aarch64", test))]
const ARM_MAX_GRANULE: u64 = 2048;

impl CacheFlush for CacheLines {
    fn granule(&self) -> u64 {
        self.granule
    }

    fn flush(&self, shared: &SharedMemory, offset: usize, len: usize) {
        Self::flush(self, shared, offset, len);
    }
}

/// # Safety
/// `line` must lie in mapped memory.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn flush_line(instruction: Instruction, line: usize) {
    match instruction {
        // SAFETY: the caller's promise; the instruction changes no architectural state.
        Instruction::ClflushOpt => unsafe {
            std::arch::asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        _ => unsafe { std::arch::asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)) },
    }
}

/// # Safety
/// `line` must lie in mapped, readable memory.
#[cfg(target_arch = "aarch64")]
#[inline]
unsafe fn flush_line(_: Instruction, line: usize) {
    // SAFETY: the caller's promise; the instruction changes no architectural state.
    unsafe { std::arch::asm!("dc civac, {}", in(reg) line, options(nostack, preserves_flags)) };
}

/// # Safety
/// None needed: there is no value of [`CacheLines`] on such a machine.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn flush_line(_: Instruction, _: usize) {}

/// Orders cache-line operations against all other accesses. CLFLUSHOPT is ordered only by fences (Intel SDM vol. 2A). DC CIVAC
/// is complete only after a DSB (Arm ARM, "Ordering and completion of data and instruction cache instructions").
#[inline]
fn barrier() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence touches no memory.
    unsafe {
        std::arch::asm!("mfence", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier touches no memory.
    unsafe {
        std::arch::asm!("dsb sy", options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vm_memory::MmapRegion;

    #[test]
    fn a_flush_does_not_change_memory() {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(8192).unwrap()));
        let bytes: Vec<u8> = (0..8192_u32).map(|i| (i % 253) as u8).collect();
        shared.copy_from(0, &bytes);

        let lines = CacheLines::detect().expect("x86-64 and arm64 have cache-line operations");
        for (offset, len) in [(0, 8192), (1, 1), (63, 2), (8191, 1), (100, 0), (8192, 0)] {
            lines.flush(&shared, offset, len);
        }

        let mut read = vec![0; 8192];
        shared.copy_to(0, &mut read);
        assert_eq!(read, bytes);
    }

    #[test]
    fn arms_register_gives_line_and_granule() {
        // CTR_EL0 of a Neoverse N1, of an A64FX with lines of 256 bytes, and without a granule.
        let sizes = [0x8444_c004, 0x8666_8006, 0x8004_c004].map(|ctr| {
            let lines = CacheLines::from_ctr(ctr);
            (lines.line(), lines.granule())
        });
        assert_eq!(sizes, [(64, 128), (256, 256), (64, 2048)]);
    }

    #[test]
    fn a_granule_holds_whole_lines() {
        let lines = CacheLines::detect().expect("x86-64 and arm64 have cache-line operations");
        println!("{lines:?}");
        assert!(lines.granule().is_multiple_of(lines.line() as u64) && lines.granule().is_power_of_two(), "{lines:?}");
    }

    #[test]
    #[should_panic(expected = "2 bytes at 8191")]
    fn a_flush_past_the_end_panics() {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(8192).unwrap()));
        CacheLines::detect().unwrap().flush(&shared, 8191, 2);
    }
}
