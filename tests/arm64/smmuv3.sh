#!/bin/sh
# An emulated arm64 host with an SMMUv3 and Debian's own kernel, which has VFIO type1 and no iommufd: what the kernel answers, the
# verdict under each policy, and data that goes through the SMMU. TCG emulates no caches: DC CIVAC runs here, and what it achieves
# is not seen.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh
# shellcheck source=tests/arm64/lib.sh
. /testbed/arm64/lib.sh

flushed() {
    FUNCTION=0000:00:05.0
    oracle assume --packed
    [ "$(statistic flushed_bytes)" -gt 0 ] && [ "$(statistic map_flushed_bytes)" -gt 0 ]
    equal 0 "$(statistic staged)" staged
}
whole_refused() {
    killed_before
    timeout 60 vhost-device-vfio --vfio-user --socket-path /run/whole.sock --device "$FUNCTION" --no-snoop assume \
        >/run/answer 2>&1 && return 1
    contains 'with VFIO type1 memory cannot be flushed before the guest' /run/answer
}

# The window that Linux reserves for the doorbells of interrupt controllers (MSI_IOVA_BASE in drivers/iommu/arm/arm-smmu-v3).
answers_are iommu=smmuv3 interface=type1 dma_cc=0 iova_ranges=0x0-0x7ffffff,0x8100000-
verdicts
claim "split rings: the oracle finds nothing wrong, and nothing is flushed" nothing_flushed "$FUNCTION"
claim "packed rings under a flushing verdict: the oracle finds nothing wrong, and requests are flushed with DC CIVAC" flushed
claim "a whole function is refused under a flushing verdict: type1 cannot stage" whole_refused
# KVM runs at the emulated EL2, so the shim meets its device and a vCPU here.
shim_tests() {
    SHIM_LIBRARY=/usr/local/shim/libkvm_vfio_shim.so "/usr/local/shim/deps/$1" --nocapture --test-threads 1 >/run/said 2>&1 || {
        tail -n 30 /run/said
        return 1
    }
    lacks 'not tested' /run/said
}
claim "there is KVM" test -c /dev/kvm
claim "the shim's own tests pass with KVM" shim_tests kvm_vfio_shim
claim "the preloaded library's tests pass with KVM and a vCPU" shim_tests hooks
live_tests '^type1::'
finished
