//! Where a cache line of shared memory was seen, to bring it in early. A line that the driver has just written comes from another
//! processor. Lines that are asked for together come together.

use super::{SharedArray, Word};

/// The address of a line. It is only a guess: nothing keeps the memory mapped, and what is there may be for something else now.
#[derive(Clone, Copy, Default)]
pub struct Line(usize);

impl Line {
    /// Brings the line in, to be read.
    #[inline(always)]
    pub fn prefetch(self) {
        // SAFETY: a prefetch changes no state that a program can see, and never faults, whatever the address (Intel SDM 2B,
        // PREFETCHh; Arm ARM C6, PRFM).
        unsafe {
            #[cfg(target_arch = "x86_64")]
            std::arch::asm!("prefetcht0 [{}]", in(reg) self.0, options(nostack, preserves_flags, readonly));
            #[cfg(target_arch = "aarch64")]
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) self.0, options(nostack, preserves_flags, readonly));
        }
    }
}

impl<O, W: Word, const N: usize> SharedArray<O, W, N> {
    /// The line of an entry, or one outside if the index is.
    #[inline(always)]
    #[must_use]
    pub fn line(&self, index: usize) -> Line {
        Line(self.base.as_ptr().wrapping_add(index.wrapping_mul(N)) as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::MmapRegion;

    use super::super::SharedMemory;
    use super::*;

    #[test]
    fn a_line_may_be_prefetched_where_nothing_is_mapped() {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(4096).expect("anonymous memory")));
        let inside = shared.array::<u64, 2>(0, 4).unwrap().line(1);
        let outside = shared.array::<u64, 2>(0, 4).unwrap().line(usize::MAX);
        drop(shared);

        for line in [inside, outside, Line::default(), Line(usize::MAX)] {
            line.prefetch();
        }
    }

    #[test]
    fn the_line_of_an_entry_is_at_its_first_word() {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(4096).expect("anonymous memory")));
        let entries = shared.array::<u64, 2>(64, 4).unwrap();

        let Line(first) = entries.line(0);
        let Line(third) = entries.line(2);

        assert_eq!(first as u64, shared.host_address() + 64);
        assert_eq!(third, first + 2 * 16);
    }
}
