#!/bin/sh
# profiles: debian
# minutes: 0.8
# boot: iommu
# options: --qemu trixie-backports
# A whole function through a group and a container: a guest's own driver, a front-end that was given the device's file, and what
# keeps others from the function afterwards. On one profile: Debian's own kernels differ only in what tests/host/type1.sh shows.
# Also a disk with the shim: what KVM is told.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

with_guest() {
    use_process drive
    guest start --mem 96M --smp 1 --hugepages --timeout 300 \
        --qemu-arg -device --qemu-arg "$(vfio_user_device drive)" || return
    guest exec --timeout 200 -- '
        n=0; until [ -b /dev/nvme0n1 ]; do [ $n -lt 600 ] || exit 1; n=$((n + 1)); usleep 100000; done
        fio --name=verify --filename=/dev/nvme0n1 --direct=1 --rw=randrw --bsrange=512-128k --blockalign=512 --size=8M \
            --iodepth=8 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --output=/tmp/fio.log ||
            { cat /tmp/fio.log; exit 1; }'
}
served() {
    pages_pinned >/run/pins
    serve_whole drive "$FUNCTION" --iommu type1
    logged 'through VFIO type1, as --iommu=type1 says'
    with_guest
    equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"
    logged 'read-only'
    logged 'the device.s own file'
}
# The kernel opens a group's device as often as it is asked to. That the group can be opened again is the proof that nobody has a
# file of the device.
held() {
    use_process drive
    vfio-rights "$(guest pid)" hold-group >/run/held 2>&1 &
    echo $! >/run/holder.pid
    within 10 contains 'held ' /run/held
    guest kill
    within 15 logged 'front-end disconnected'
    within 10 logged "the device's own file, .*is still open or mapped: .*in use by process $(cat /run/holder.pid) \(vfio-rights"
    equal "$(cat /run/pins)" "$(pages_pinned)" "pages pinned in this machine"
    kill -KILL "$(cat /run/holder.pid)"
    within 10 logged 'acquired anew; nobody else has its file'
}
served_again() {
    use_process drive
    with_guest
    guest stop
    backend_stop
    within 5 equal "$(cat /run/pins)" "$(pages_pinned)"
}

# This kernel has no character device for KVM, and the group's file is not handed out. The shim still blocks discards.
not_told() {
    use_process backend
    backend_start --no-snoop assume --kvm-socket /run/kvm.sock
    guest_start --mem 96M --hugepages --shim /run/kvm.sock
    guest exec --timeout 60 -- 'dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null'
    logged 'registered: .* 1 device.s. registered; .*KVM is not told'
    vfio-rights "$(guest pid)" >/run/handed-over
    guest stop
    backend_stop
    equal "1 0" "$(statistic registrations) $(statistic told)" "registrations, and those that told KVM"
    equal '' "$(cat /run/handed-over)" "VFIO files that QEMU was given"
}

claim "a guest drives a whole function, whose read-only memory is mapped, too" served
claim "as long as anyone has the device's file, nobody else is served" held
claim "the next guest is served, and nothing stays pinned" served_again
claim "with a shim memory is kept, QEMU is given no file, and KVM is not told" not_told
finished
