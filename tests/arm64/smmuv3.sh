#!/bin/sh
# An emulated arm64 host with an SMMUv3 and Debian's own kernel, which has VFIO type1 and no iommufd: what the kernel answers, the
# verdict under each policy, and data that goes through the SMMU. TCG emulates no caches: DC CIVAC runs here, and what it achieves
# is not seen.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

# The window that Linux reserves for the doorbells of interrupt controllers (MSI_IOVA_BASE in drivers/iommu/arm/arm-smmu-v3).
RANGES=0x0-0x7ffffff,0x8100000-

# A claim that failed may have left a backend.
killed_before() {
    [ ! -s "$BACKEND_PID" ] || kill -KILL "$(cat "$BACKEND_PID")" 2>/dev/null || true
    within 10 test ! -d "/proc/$(cat "$BACKEND_PID" 2>/dev/null || echo none)"
}
answered() { contains "$1" /run/answers; }
verdict() {
    backend_start --no-snoop "$1"
    logged "DMA is $2\$"
    backend_stop
}
# oracle POLICY [OPTION…]: a front-end whose oracle knows each block, of an empty drive. It reads the whole drive at the end.
oracle() {
    policy=$1
    shift
    killed_before
    backend_start --queues 2 --no-snoop "$policy"
    { echo 3000 && sleep 1 && echo end; } | timeout 200 front-end "$SOCKET" "$@" >/run/oracle || {
        cat /run/oracle "$BACKEND_LOG"
        return 1
    }
    contains 'nothing lost, doubled or reordered' /run/oracle
    within 10 logged 'unmapped'
    backend_stop
}
flushed() {
    FUNCTION=0000:00:05.0
    oracle assume --packed
    [ "$(statistic flushed_bytes)" -gt 0 ] && [ "$(statistic map_flushed_bytes)" -gt 0 ]
    equal 0 "$(statistic staged)" staged
}
nothing_flushed() {
    oracle suppress
    equal 0 "$(statistic flushed_bytes)" flushed_bytes
}
whole_refused() {
    killed_before
    timeout 60 vhost-device-vfio --vfio-user --socket-path /run/whole.sock --device "$FUNCTION" --no-snoop assume \
        >/run/answer 2>&1 && return 1
    contains 'with VFIO type1 memory cannot be flushed before the guest' /run/answer
}

iommu-probe "$FUNCTION" >/run/answers || exit
vhost-device-vfio inspect "$FUNCTION" >/run/inspected
sed 's/^/# /' /run/answers
for answer in iommu=smmuv3 interface=type1 dma_cc=0 "iova_ranges=$RANGES"; do
    claim "the kernel answers $answer" answered "$answer"
done
claim "the report says that snooping is not enforced" contains 'snoop-enforced  no' /run/inspected
for policy in suppress allow refuse; do
    claim "--no-snoop $policy: coherent, because the device never sets No Snoop" \
        verdict "$policy" 'coherent: the device never sets No Snoop'
done
claim "--no-snoop assume: flushed around each request" \
    verdict assume 'not coherent: flushed at map, at unmap and around each request; KVM is not told'
claim "split rings: the oracle finds nothing wrong, and nothing is flushed" nothing_flushed
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
live --list 2>/dev/null | sed -n 's/^\(type1::.*\): test$/\1/p' >/run/names
claim "there are tests of the container" test -s /run/names
while read -r name; do
    claim "$(echo "$name" | sed 's/::/: /' | tr _ ' ')" env VDV_DEVICE="$FUNCTION" live --exact "$name"
done </run/names
finished
