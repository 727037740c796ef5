#!/bin/sh
# profiles: vtd vtd-snoop
# minutes: 0.5
# boot: plain
# A guest in stock QEMU uses a drive that the backend owns.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

disk_as_it_is() {
    guest exec -- '
        [ "$(cat /sys/block/vda/size)" = 524288 ] || exit 11
        [ "$(cat /sys/block/vda/queue/logical_block_size)" = 512 ] || exit 12
        [ "$(cat /sys/block/vda/serial)" = testbed ] || exit 13
        [ "$(cat /sys/block/vda/ro)" = 0 ] || exit 14
        [ "$(ls /sys/block/vda/mq | wc -l)" = 2 ] || exit 15'
}
file_system() {
    guest exec -- '
        set -e
        mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/file bs=64k count=32 2>/dev/null
        sum=$(sha256sum </mnt/file)
        umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount /dev/vda /mnt
        [ "$(sha256sum </mnt/file)" = "$sum" ]
        umount /mnt'
}
# Every map and unmap enters the kernel through iommufd_fops_ioctl.
no_maps() {
    echo 'p:entered iommufd_fops_ioctl' >/sys/kernel/tracing/kprobe_events
    echo 1 >/sys/kernel/tracing/events/kprobes/entered/enable
    guest exec -- 'dd if=/dev/vda of=/dev/null bs=64k count=200 iflag=direct 2>/dev/null'
    calls=$(grep -c entered: /sys/kernel/tracing/trace || true)
    echo 0 >/sys/kernel/tracing/events/kprobes/entered/enable
    echo >/sys/kernel/tracing/kprobe_events
    equal 0 "$calls" "iommufd calls during 200 requests"
}
idle() {
    sleep 1
    before=$(cpu_ticks)
    sleep 3
    # Of 300. Once a second the backend checks whether guest memory has been discarded.
    [ $(($(cpu_ticks) - before)) -le 3 ]
}
warned() {
    case $PROFILE in
    vtd-snoop) equal 0 "$(times_logged 'WARN.*does not enforce snooping')" warnings ;;
    *) equal 1 "$(times_logged 'WARN.*does not enforce snooping')" warnings ;;
    esac
}
unpinned() {
    guest stop
    within 10 logged 'front-end disconnected'
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
}
ended() {
    backend_stop
    [ ! -e "$SOCKET" ]
    logged 'shut down'
}
in_order() {
    bind_to_nvme "$FUNCTION"
    # The magic number of an ext2, ext3 or ext4 file system.
    equal 53ef "$(dd if="$(block_device "$FUNCTION")" bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1 | tr -d ' ')" "magic number"
}

backend_start --queues 2 || exit
if [ "$PROFILE" = vtd-snoop ]; then
    # Only the warning depends on the IOMMU. tests/host/shim.sh verifies a guest's data on this profile.
    claim "the log warns of an IOMMU that does not enforce snooping, and only of such" warned
    claim "SIGTERM ends the backend with status 0, the socket removed, the controller shut down" ended
    finished
fi
pinned >/run/pinned-before
guest_start --queues 2 --smp 2 || exit

claim "a guest sees the disk's properties and queues" disk_as_it_is
claim "a verifying random workload finds no wrong byte" verify
claim "a file system survives a remount" file_system
claim "requests map nothing" no_maps
claim "an idle backend uses at most a hundredth of a processor" idle
claim "the log warns of an IOMMU that does not enforce snooping, and only of such" warned
claim "nothing of the guest is pinned after it has ended" unpinned
claim "SIGTERM ends the backend with status 0, the socket removed, the controller shut down" ended
claim "the kernel's own driver then finds the file system" in_order
finished
