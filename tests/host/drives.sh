#!/bin/sh
# profiles: vtd
# minutes: 1
# options: --nvme logical_block_size=4096,physical_block_size=4096,mdts=3
# A drive with blocks of 4096 bytes that takes 32 KiB at a time, served for writing and for reading only.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

blocks_of_4096() {
    guest exec -- '
        [ "$(cat /sys/block/vda/queue/logical_block_size)" = 4096 ] && [ "$(cat /sys/block/vda/size)" = 524288 ]'
}
split() { verifying --bsrange=4k-1M --blockalign=4k; }
packed() {
    guest stop
    guest_start --queues 2 --blk packed=on
    logged 'RING_PACKED'
    verifying --bsrange=4k-1M --blockalign=4k
}
read_only() {
    sum=$(guest exec -- 'dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum')
    guest stop
    backend_stop
    backend_start --read-only
    guest_start
    guest exec -- "
        [ \"\$(cat /sys/block/vda/ro)\" = 1 ] || exit 11
        ! dd if=/dev/zero of=/dev/vda bs=64k count=1 oflag=direct 2>/dev/null || exit 12
        [ \"\$(dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | sha256sum)\" = '$sum' ] || exit 13"
}

backend_start --queues 2 || exit
guest_start || exit
claim "blocks of 4096 bytes reach the guest" blocks_of_4096
claim "requests larger than the drive takes are split, and data verify" split
claim "packed rings carry the same, and data verify" packed
claim "a read-only disk refuses writes and keeps its bytes" read_only
guest stop
backend_stop
finished
