#!/bin/sh
# profiles: debian
# minutes: 3
# options: --qemu trixie-backports --guest-kernel trixie-backports --add /usr/sbin/blkzone --add /usr/sbin/mkfs.btrfs --qemu-arg -drive --qemu-arg if=none,id=zoned,snapshot=on,format=raw,file.driver=null-co,file.size=256M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme,id=zonedctl,serial=zoned,addr=9,zoned.zasl=5 --qemu-arg -device --qemu-arg nvme-ns,bus=zonedctl,drive=zoned,zoned=on,zoned.zone_size=16M,zoned.zone_capacity=12M,zoned.max_open=8,zoned.max_active=12,logical_block_size=4096,physical_block_size=4096
# A zoned namespace in a guest, on Debian's kernel, because the testbed's own knows no zones: reports, sequential writes,
# zonefs, and btrfs, which appends. Then the host's nvme driver and btrfs read what the guest wrote, so the host runs Debian's
# kernel as well. It boots alone: no other test has the drive, and two guests boot on a kernel that is five times as slow to
# boot here.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

FUNCTION=0000:00:09.0
KERNEL=/testbed/debian-kernel
# Sectors of a zone.
ZONE=32768

# zoned_guest [OPTION of "guest start"]…: a guest with the backend's disk behind QEMU's generic device, which passes all features.
zoned_guest() {
    guest start --mem 256M --hugepages --smp 2 --timeout 400 --qemu-arg -chardev --qemu-arg "socket,id=zoned,path=$SOCKET" \
        --qemu-arg -device --qemu-arg vhost-user-test-device-pci,virtio-id=2,config_size=96,num_vqs=2,vq_size=128,chardev=zoned "$@"
}

served() {
    bind_to_vfio "$FUNCTION"
    backend_start --queues 2
    logged "$FUNCTION: zones of 16M, appends up to 128K, most open 8, active 12"
}
stock_refused() {
    guest_start >/run/said 2>&1 && return 1
    logged 'refused: the drive is zoned, and this front-end gives its guest 57 bytes .*vhost-user-test-device-pci'
    guest kill 2>/dev/null || true
}
old_kernel_refused() {
    zoned_guest
    guest exec -- '! [ -e /dev/vda ]'
    guest stop
}
shown() {
    zoned_guest --kernel "$KERNEL" --add blkzone --add mkfs.btrfs
    guest exec -- 'cd /sys/block/vda/queue && cat zoned chunk_sectors nr_zones max_open_zones max_active_zones \
        zone_append_max_bytes logical_block_size | tr "\n" " "' >/run/said
    equal "host-managed $ZONE 16 8 12 65536 4096 " "$(cat /run/said)" "what the guest sees"
    equal 16 "$(guest exec -- 'blkzone report /dev/vda | grep -c "cap 0x006000, wptr 0x000000 .*zcond: 1(em)"')" "empty zones"
}
# wp ZONE: its write pointer and state, from the guest's BLKREPORTZONE.
wp() { guest exec -- "blkzone report -c 1 -o $(($1 * ZONE)) /dev/vda" | sed 's/.*\(wptr 0x[0-9a-f]*\) .*zcond: *\([0-9]*\).*/\1 \2/'; }
written() {
    # 1 MiB in a request, 512 KiB in a command of the drive.
    guest exec -- 'dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null
        echo 1024 >/sys/block/vda/queue/max_sectors_kb 2>/dev/null
        dd if=/tmp/data of=/dev/vda bs=1M seek=16 oflag=direct 2>/dev/null &&
        dd if=/dev/vda bs=1M skip=16 count=2 iflag=direct 2>/dev/null | cmp - /tmp/data'
    equal "wptr 0x001000 2" "$(wp 1)" "the written zone"
    guest exec -- '! dd if=/tmp/data of=/dev/vda bs=1M count=1 seek=20 oflag=direct 2>/dev/null'
    equal "wptr 0x001000 2" "$(wp 1)" "the same, after a write elsewhere"
}
managed() {
    guest exec -- "blkzone close -c 1 -o $ZONE /dev/vda"
    equal "wptr 0x001000 4" "$(wp 1)" "the closed zone"
    guest exec -- "blkzone finish -c 1 -o $ZONE /dev/vda && blkzone open -c 1 -o $((2 * ZONE)) /dev/vda"
    equal "14 3" "$(wp 1 | cut -d ' ' -f 3) $(wp 2 | cut -d ' ' -f 3)" "full, and explicitly open"
    guest exec -- 'blkzone reset /dev/vda'
    equal "wptr 0x000000 1" "$(wp 1)" "the reset zone"
}
# Magic, CRC32, label "zoned", UUID, features and permissions.
zonefs() {
    guest exec -- '{ printf "SFOZ\150\223\166\247zoned" && head -c 59 /dev/zero &&
        printf "\001\002\003\004\005\006\007\010\011\012\013\014\015\016\017\020" && head -c 16 /dev/zero &&
        printf "\240\001\000\000" && head -c 3988 /dev/zero; } >/tmp/super
        dd if=/tmp/super of=/dev/vda bs=4096 oflag=direct 2>/dev/null && mount -t zonefs /dev/vda /mnt || exit 11
        [ "$(ls /mnt/seq | wc -l)" = 15 ] || exit 12
        dd if=/tmp/data of=/mnt/seq/3 bs=128k oflag=direct 2>/dev/null && cmp /mnt/seq/3 /tmp/data || exit 13
        umount /mnt && mount -t zonefs /dev/vda /mnt && cmp /mnt/seq/3 /tmp/data || exit 14
        [ "$(stat -c %s /mnt/seq/3)" = 2097152 ] && umount /mnt && blkzone reset /dev/vda'
}
btrfs() {
    guest exec --timeout 400 -- 'mkfs.btrfs -q -d single -m single /dev/vda >/dev/null && mount -t btrfs /dev/vda /mnt &&
        for n in 1 2 3 4 5; do dd if=/tmp/data of=/mnt/$n bs=64k 2>/dev/null || exit 11; done
        umount /mnt && mount -t btrfs /dev/vda /mnt && for n in 1 2 3 4 5; do cmp /mnt/$n /tmp/data || exit 12; done
        umount /mnt && ! dmesg | grep -E "I/O error|BTRFS error" && sha256sum </tmp/data' >/run/sum || { cat /run/sum && return 1; }
    guest stop
    backend_stop
    # Linux itself fails a write elsewhere than at the write pointer, so none has reached the drive.
    equal 0 "$(statistic errors)" "requests that failed"
    [ "$(statistic bytes_written)" -gt 14000000 ]
}
read_by_the_host() {
    while read -r module; do insmod "$KERNEL/modules/$module" 2>/dev/null || true; done <"$KERNEL/modules/order"
    bind_to_nvme "$FUNCTION"
    mount -t btrfs "$(block_device "$FUNCTION")" /mnt
    for n in 1 2 3 4 5; do equal "$(cat /run/sum)" "$(sha256sum </mnt/"$n")" "file $n"; done
    umount /mnt
}

claim "a zoned namespace is served" served
claim "QEMU's vhost-user-blk, which knows no zones, is refused with the reason" stock_refused
claim "a guest whose kernel knows no zones gets no disk" old_kernel_refused
claim "a guest sees the zones and their limits" shown
claim "zones are written at their write pointers, and nowhere else" written
claim "zones are closed, finished, opened and reset" managed
claim "zonefs is mounted, and a file of it is read back" zonefs
claim "btrfs appends, and its files are read back" btrfs
claim "the host's own driver reads what the guest wrote" read_by_the_host
finished
