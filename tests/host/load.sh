#!/bin/sh
# profiles: vtd
# minutes: 1
# boot: load
# options: --drive-size 128M --qemu-arg -drive --qemu-arg if=none,id=other,snapshot=on,format=raw,file.driver=null-co,file.size=128M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme,serial=other,drive=other,addr=5,logical_block_size=4096,physical_block_size=4096
# A load of every kind and size of request, each checked, with each kind of ring, page and block at least once. A virtual machine
# is killed under this load. Also the backend's own memory use. tests/long/load.sh has every combination.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

: >/run/killed
own=$FUNCTION FUNCTION=0000:00:05.0
bind_to_vfio "$FUNCTION"
backend_start --queues 2 || exit
record_resources
claim "packed ring, pages of 2M, blocks of 4096: data verify, and a kill leaves nothing" stress_combination packed 2M 4096
backend_stop
FUNCTION=$own

backend_start --queues 2 || exit
record_resources
claim "split ring, pages of 4K, blocks of 512: data verify, and a kill leaves nothing" stress_combination split 4K 512
backend_stop
claim "with 4 queues of 256 the backend needs at most 24 MiB besides the guest's memory" small_with_four_queues
echo "# besides the guest's memory: $(cat /run/own) kB"
finished
