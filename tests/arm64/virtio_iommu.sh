#!/bin/sh
# An emulated arm64 host with the paravirtual IOMMU and a kernel with iommufd: what the kernel answers, the verdict under each
# policy, and memory that is staged and flushed.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh
# shellcheck source=tests/arm64/lib.sh
. /testbed/arm64/lib.sh

# hw_type 0: IOMMU_HW_INFO_TYPE_NONE. The gap: QEMU reserves the two pages of the ITS, which it does not translate.
answers_are iommu=virtio hw_type=0 dma_cc=0 iova_ranges=0x0-0x808ffff,0x80a0000-0xffffffffffff
verdicts
claim "split rings: the oracle finds nothing wrong, and nothing is flushed or staged" nothing_flushed "$FUNCTION"
claim "packed rings under a flushing verdict: staged, flushed, and the oracle finds nothing wrong" flushed_and_staged
finished
