#!/bin/sh
# An emulated arm64 host with an SMMUv3 and Debian's own kernel, which has VFIO type1 and no iommufd: what the kernel answers, the
# verdict under each policy, data that goes through the SMMU, and a guest. TCG emulates no caches: DC CIVAC runs here, and what it
# achieves is not seen.

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

# A guest on KVM at the emulated EL2, whose pages have another size than this host's, writes to the drive and reads it back. Its
# memory and its requests are flushed.
guest_verifies() {
    killed_before
    rm -rf /run/guest && mkdir -p /run/guest/bin /run/guest/dev /run/guest/proc
    cp /bin/busybox /run/guest/bin/
    cp /testbed/arm64/guest_init /run/guest/init
    cp -r /testbed/guest/modules /run/guest/
    (cd /run/guest && find . | cpio -o -H newc) >/run/guest.cpio
    backend_start --no-snoop assume
    timeout 200 /opt/qemu/lib/ld-linux-aarch64.so.1 --library-path /opt/qemu/lib /opt/qemu/bin/qemu-system-aarch64 \
        -machine virt,gic-version=3,memory-backend=ram -accel kvm -cpu host -m 256M -nodefaults -no-user-config -display none \
        -object memory-backend-memfd,id=ram,size=256M,share=on -kernel /testbed/guest/vmlinuz -initrd /run/guest.cpio \
        -append 'console=ttyAMA0 quiet panic=-1' -no-reboot -serial file:/run/console \
        -chardev "socket,id=disk,path=$SOCKET" -device vhost-user-blk-pci,chardev=disk </dev/null || true
    contains 'guest: verified' /run/console
    pages=$(sed -n 's/^guest: verified with pages of \([0-9]*K\).*/\1/p' /run/console)
    [ "$pages" != "$(page_size)" ] || { echo "host and guest have pages of $pages" && return 1; }
    within 10 logged 'unmapped'
    backend_stop
    [ "$(statistic map_flushed_bytes)" -ge $((256 << 20)) ] && [ "$(statistic bytes_written)" -ge $((4 << 20)) ]
}
# AT_PAGESZ of getauxval(3).
page_size() { od -A n -t d8 -v -w16 /proc/self/auxv | awk '$1 == 6 { print $2 / 1024 "K" }'; }

# The window that Linux reserves for the doorbells of interrupt controllers (MSI_IOVA_BASE in drivers/iommu/arm/arm-smmu-v3).
answers_are iommu=smmuv3 interface=type1 dma_cc=0 iova_ranges=0x0-0x7ffffff,0x8100000-
verdicts
claim "split rings: the oracle finds nothing wrong, and nothing is flushed" nothing_flushed "$FUNCTION"
claim "packed rings under a flushing verdict: the oracle finds nothing wrong, and requests are flushed with DC CIVAC" flushed
claim "a whole function is refused under a flushing verdict: type1 cannot stage" whole_refused
claim "what the sandbox forbids ends the process, and what each thread needs is allowed" unit_tests sandbox::
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
claim "a guest with pages of another size on this host's KVM verifies its data, under a flushing verdict" guest_verifies
live_tests '^type1::'
finished
