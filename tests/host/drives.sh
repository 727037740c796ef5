#!/bin/sh
# profiles: vtd
# minutes: 0.9
# options: --nvme logical_block_size=4096,physical_block_size=4096,mdts=3 --qemu-arg -blockdev --qemu-arg driver=null-co,size=67108864,node-name=second --qemu-arg -device --qemu-arg nvme-ns,drive=second,nsid=2 --qemu-arg -blockdev --qemu-arg driver=null-co,size=134217728,node-name=third --qemu-arg -device --qemu-arg nvme-ns,drive=third,nsid=3,zoned=on,zoned.zone_size=16M --qemu-arg -blockdev --qemu-arg driver=null-co,size=67108864,node-name=fourth --qemu-arg -device --qemu-arg nvme-ns,drive=fourth,nsid=4,ms=8
# A drive with blocks of 4096 bytes and a maximum data transfer of 32 KiB, served read-write and read-only; and its second
# namespace, of 64 MiB. Its third is zoned, and its fourth has metadata.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

blocks_of_4096() {
    guest exec -- '
        [ "$(cat /sys/block/vda/queue/logical_block_size)" = 4096 ] && [ "$(cat /sys/block/vda/size)" = 524288 ]'
}
split() { verify --bsrange=4k-1M --blockalign=4k; }
packed() {
    guest stop
    guest_start --queues 2 --blk packed=on
    logged 'RING_PACKED'
    verify --bsrange=4k-1M --blockalign=4k
}
read_only() {
    sum=$(guest exec -- 'dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum')
    guest stop
    backend_stop
    backend_start --read-only --namespace 1
    guest_start
    guest exec -- "
        [ \"\$(cat /sys/block/vda/ro)\" = 1 ] || exit 11
        ! dd if=/dev/zero of=/dev/vda bs=64k count=1 oflag=direct 2>/dev/null || exit 12
        [ \"\$(dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum)\" = '$sum' ] || exit 13"
}
none_chosen() {
    guest stop
    backend_stop
    timeout 30 vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" 2>/run/said && return 1
    contains 'has several namespaces: 1, 2, 3, 4; choose one with --namespace' /run/said
}
second() {
    backend_start --namespace 2
    guest_start
    guest exec -- '[ "$(cat /sys/block/vda/size)" = 131072 ] && dd if=/dev/vda of=/dev/null bs=1M iflag=direct 2>/dev/null'
}

zoned() {
    guest stop
    backend_stop
    backend_start --namespace 3
    within 20 logged 'zones of 16M'
    guest_start >/run/said 2>&1 && return 1
    logged 'refused: the drive is zoned, and this front-end gives its guest 57 bytes'
    backend_stop
    backend_start --namespace 2
}

with_metadata() {
    backend_stop
    backend_start --namespace 4
    guest_start
    guest exec -- 'dd if=/dev/zero of=/dev/vda bs=1M count=8 oflag=direct 2>/dev/null &&
        dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null'
    equal 0 "$(times_logged 'command 0x')" "commands that failed"
    guest stop
}

backend_start --queues 2 --namespace 1 || exit
guest_start || exit
claim "blocks of 4096 bytes reach the guest" blocks_of_4096
claim "requests larger than the drive accepts are split, and data verify" split
claim "the same with packed rings, and data verify" packed
claim "a read-only disk refuses writes and keeps its data" read_only
claim "with two namespaces one must be chosen, and the error lists them" none_chosen
claim "the second namespace is served with its own size" second
claim "a zoned namespace is no disk for a front-end without zones, and another is served afterwards" zoned
claim "a namespace with 8 bytes of metadata in a buffer of their own is served" with_metadata
backend_stop
finished
