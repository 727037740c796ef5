#!/bin/sh
# profiles: vtd vtd-snoop debian
# minutes: 1
# boot: iommu
# options: --qemu-arg -device --qemu-arg nvme,id=several,serial=several,addr=b --qemu-arg -drive --qemu-arg if=none,id=several1,format=raw,snapshot=on,file.driver=null-co,file.size=96M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme-ns,drive=several1,nsid=1,bus=several --qemu-arg -drive --qemu-arg if=none,id=several2,format=raw,snapshot=on,file.driver=null-co,file.size=64M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme-ns,drive=several2,nsid=2,bus=several
# Two namespaces of one drive are served by one process to two virtual machines, whose guest addresses are the same: where all
# memory is flushed, where DMA is coherent, and through VFIO type1.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

FUNCTION=0000:00:0b.0
AT=/sys/bus/pci/devices/$FUNCTION
SECOND=/run/second.sock

second() { guest --name second "$@"; }
sectors() { cat /sys/block/vda/size; }
served() {
    guest_start --queues 2 --mem 96M --add stress
    second start --socket "$SECOND" --timeout 300 --queues 1 --mem 96M
    equal 196608 "$(guest exec -- 'cat /sys/block/vda/size')" "sectors of the first"
    equal 131072 "$(second exec -- 'cat /sys/block/vda/size')" "sectors of the second"
    equal several_1 "$(guest exec -- 'cat /sys/block/vda/serial')" "serial number of the first"
    equal several_2 "$(second exec -- 'cat /sys/block/vda/serial')" "serial number of the second"
}
both_verify() {
    verify_start --size=24M
    second exec --timeout 400 -- "$(echo "$VERIFY" | tr '\n' ' ') --size=16M || { cat /tmp/fio.log; exit 1; }"
    verify_result
}
# Each writes to the same blocks, then reads them: its own data, not the other's.
write_own() { "$@" exec -- 'dd if=/dev/urandom of=/tmp/own bs=64k count=16 2>/dev/null; dd if=/tmp/own of=/dev/vda bs=64k seek=512 oflag=direct 2>/dev/null'; }
has_own() { "$@" exec -- 'dd if=/dev/vda bs=64k skip=512 count=16 iflag=direct 2>/dev/null | cmp - /tmp/own'; }
own_data() {
    write_own guest
    write_own second
    has_own guest
    has_own second
}
taken_and_returned() {
    pinned >/run/held
    timeout 15 sh -c "echo $FUNCTION >$AT/driver/unbind"
    logged 'the host wants the device back'
    equal 0 "$(pinned)" "kB pinned while the drive is away"
    bind_to_vfio "$FUNCTION"
    within 30 logged 'the device is back'
    equal "$(cat /run/held)" "$(pinned)" "kB pinned"
    has_own guest
    has_own second
}
second_killed() {
    stress_start 600
    second exec -- '(dd if=/dev/vda of=/dev/null bs=64k iflag=direct >/dev/null 2>&1 &); sleep 1'
    second kill
    within 15 logged 'front-end disconnected'
    stress_stop
    stress_result
}
next_second() {
    second start --socket "$SECOND" --timeout 300 --queues 1 --mem 96M
    second exec -- 'dd if=/dev/vda of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null'
    second stop
    guest exec -- 'dd if=/dev/vda of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null'
}
nothing_left() {
    guest stop
    within 15 equal_pins
    backend_stop
    equal 2 "$(times_logged 'statistics: namespace=[12] .* errors=0 ')" "statistics without an error"
    equal 2 "$(times_logged 'reads=[1-9].* writes=[1-9]')" "statistics of both disks"
}
equal_pins() { equal "$(cat /run/idle)" "$(pinned)" "kB pinned"; }

bind_to_vfio "$FUNCTION" || exit
backend_start --queues 2 --namespace 1 --namespace 2 --socket-path "$SECOND" || exit
within 20 logged 'namespace 2, disk 1, on' || exit
pinned >/run/idle
claim "two virtual machines have a namespace each, from one process" served
claim "both verify their data at the same time" both_verify
claim "the same blocks have the data of their own machine" own_data
claim "the host takes the drive and returns it, and both go on with their data" taken_and_returned
claim "one is killed under the load of the other, which goes on" second_killed
claim "the next one is served" next_second
claim "nothing stays pinned, and no request has failed" nothing_left
finished
