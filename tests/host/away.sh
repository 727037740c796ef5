#!/bin/sh
# profiles: vtd
# minutes: 1.1
# boot: life
# options: --iops 800
# The host takes the drive away while requests are in flight, and returns it. Meanwhile the guest gets errors. Afterwards the
# same process serves the same guest again.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

AT=/sys/bus/pci/devices/$FUNCTION

load_in_background() {
    guest exec -- 'while [ ! -e /tmp/enough ]; do
            fio --name=load --filename=/dev/vda --direct=1 --rw=randrw --bs=4k --size=64M --iodepth=64 \
                --ioengine=io_uring --time_based --runtime=300 >/dev/null 2>&1
            sleep 0.2
        done &
        sleep 2'
}
enough_load() { guest exec -- 'touch /tmp/enough; killall fio; sleep 1; rm /tmp/enough'; }
pattern() { guest exec -- 'dd if=/dev/vda bs=64k skip=2048 count=64 iflag=direct 2>/dev/null | sha256sum'; }
write_pattern() { guest exec -- 'dd if=/dev/urandom of=/dev/vda bs=64k seek=2048 count=64 oflag=direct 2>/dev/null'; }
reads_fail() { guest exec --timeout 10 -- '! dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null'; }
reads_well() { guest exec --timeout 30 -- 'dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null'; }
# away COMMAND…: runs COMMAND, which takes the drive away, under load. Neither the command nor the guest may have to wait.
away() {
    load_in_background
    timeout 15 sh -c "$*"
    reads_fail
    logged 'the host wants the device back'
    equal 0 "$(pinned)" "kB pinned while the drive is away"
}
# back_after N: the same process serves the drive again, for the Nth time, with the same data and resources.
back_after() {
    within 30 logged_more_than "$(($1 - 1))" 'the device is back'
    enough_load
    reads_well
    equal "$(cat /run/pattern)" "$(pattern)" "data"
    equal "$(cat /run/pid-before)" "$(cat "$BACKEND_PID")" "process"
    [ ! -s "$BACKEND_STATUS" ]
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-before)" "$(descriptors)" "descriptors"
}

unbound() { away "echo $FUNCTION >$AT/driver/unbind"; }
rebound() {
    bind_to_vfio "$FUNCTION"
    back_after 1
}
removed() { away "echo 1 >$AT/remove"; }
rescanned() {
    echo 1 >/sys/bus/pci/rescan
    within 10 test -e "$AT"
    bind_to_vfio "$FUNCTION"
    back_after 2
}
memory_meanwhile() {
    echo "$FUNCTION" >"$AT/driver/unbind"
    guest qmp object-add '{"qom-type":"memory-backend-memfd","id":"m1","size":268435456,"share":true}'
    guest qmp device_add '{"driver":"pc-dimm","id":"dimm","memdev":"m1"}'
    within 40 logged 'region 0x100000000\+256M .* mapped'
    equal 0 "$(pinned)" "kB pinned while the drive is away"
    bind_to_vfio "$FUNCTION"
    within 30 logged_more_than 2 'the device is back'
    equal $(($(cat /run/pinned-before) + 262144)) "$(pinned)" "kB pinned"
    verify
}
next_guest_meanwhile() {
    echo "$FUNCTION" >"$AT/driver/unbind"
    guest stop
    guest_start --queues 2 --mem 256M --qemu-arg -device --qemu-arg virtio-balloon-pci
    reads_fail
    bind_to_vfio "$FUNCTION"
    within 30 logged_more_than 3 'the device is back'
    guest exec -- 'blockdev --rereadpt /dev/vda' || true
    reads_well
}
discarded_meanwhile() {
    echo "$FUNCTION" >"$AT/driver/unbind"
    reads_fail
    inflate $((192 << 20))
    # The backend checks guest memory once a second.
    sleep 2
    inflate $((256 << 20))
    bind_to_vfio "$FUNCTION"
    within 30 logged_more_than 4 'the device is back'
    verify --size=16M
    equal 0 "$(times_logged "$ALARM")" alarms
}
flushing() {
    guest stop
    backend_stop
    backend_start --queues 2 --no-snoop assume
    guest_start --queues 2
    write_pattern
    pattern >/run/pattern
    echo "$FUNCTION" >"$AT/driver/unbind"
    reads_fail
    equal 0 "$(pinned)" "kB pinned while the drive is away"
    bind_to_vfio "$FUNCTION"
    within 30 logged 'the device is back'
    equal "$(cat /run/pattern)" "$(pattern)" "data"
    verify
}
ended_meanwhile() {
    echo "$FUNCTION" >"$AT/driver/unbind"
    guest stop
    backend_stop
}

backend_start --queues 2 || exit
guest_start --queues 2 --mem 512M --qemu-arg -m --qemu-arg 512M,slots=2,maxmem=4G || exit
write_pattern
pattern >/run/pattern
cp "$BACKEND_PID" /run/pid-before
pinned >/run/pinned-before
descriptors >/run/descriptors-before
claim "a drive unbound under load is released at once, everything is unpinned, and requests fail" unbound
claim "bound again, it is served by the same process to the same guest" rebound
claim "a drive removed from the bus under load is released at once, and requests fail" removed
claim "found again by a rescan and bound, it is served" rescanned
claim "memory plugged while the drive is away is accessible when it is back" memory_meanwhile
claim "a guest that starts while the drive is away has its disk when it is back" next_guest_meanwhile
claim "memory discarded while the drive is away raises no alarm, and data verify when it is back" discarded_meanwhile
claim "the same under a flushing verdict, and data verify" flushing
claim "SIGTERM while the drive is away ends the backend with status 0" ended_meanwhile
finished
