#!/bin/sh
# An emulated arm64 host with an SMMUv3 and a kernel with iommufd: what the kernel answers, the verdict under each policy, and
# memory that is staged and flushed before the SMMU maps it. TCG emulates no caches: DC CIVAC runs here, and what it achieves is
# not seen.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh
# shellcheck source=tests/arm64/lib.sh
. /testbed/arm64/lib.sh

whole_refused() {
    killed_before
    timeout 60 vhost-device-vfio --vfio-user --socket-path /run/whole.sock --device "$FUNCTION" --no-snoop assume \
        >/run/answer 2>&1 && return 1
    contains 'KVM cannot be told to let the guest flush' /run/answer
}

# hw_type 2: IOMMU_HW_INFO_TYPE_ARM_SMMUV3. The gap: MSI_IOVA_BASE in Linux's arm-smmu-v3, where doorbells are mapped.
answers_are iommu=smmuv3 hw_type=2 dma_cc=0 iova_ranges=0x0-0x7ffffff,0x8100000-0xffffffffffff
verdicts
claim "split rings: the oracle finds nothing wrong, and nothing is flushed or staged" nothing_flushed "$FUNCTION"
claim "packed rings under a flushing verdict: staged and flushed, and the oracle finds nothing wrong" flushed_and_staged
claim "a whole function is refused under a flushing verdict without the shim: KVM cannot be told" whole_refused
live_tests '^(second::)?[^:]*$' coherent
live_tests '^(second::)?[^:]*$' flushing
live_tests '^hand_over::' flushing
# Among them: a region that cuts a page of the host is refused with its size.
live_tests '^type1::'
finished
