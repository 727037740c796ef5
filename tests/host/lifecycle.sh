#!/bin/sh
# profiles: vtd
# minutes: 1.1
# boot: life
# options: --iops 800
# The life cycle of a virtual machine: reset, stop and continue, disconnect and reconnect, die with requests in flight.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

reads_well() { guest exec -- 'dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null'; }
load_in_background() {
    guest exec -- 'fio --name=load --filename=/dev/vda --direct=1 --rw=randrw --bs=4k --size=64M --iodepth=64 \
        --ioengine=io_uring --time_based --runtime=300 >/dev/null 2>&1 &
        sleep 2'
}
killed() {
    before=$(times_logged 'front-end disconnected' || true)
    guest kill
    within 15 logged_more_than "$before" 'front-end disconnected'
}
nothing_left() {
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-before)" "$(descriptors)" "descriptors"
}

reset() {
    guest qmp system_reset
    guest ready --timeout 300
    reads_well
}
stopped_and_continued() {
    verify_start
    for _ in 1 2 3; do
        guest qmp stop
        sleep 1
        guest qmp cont
    done
    verify_result
}
second_refused() {
    guest --name second start --socket "$SOCKET" --mem 128M --timeout 10 && return 1
    guest --name second kill || true
    logged 'sent .* away: this device is being used by qemu-system-x86 \(pid'
    reads_well
}
killed_under_load() {
    load_in_background
    killed
    nothing_left
}
next_one() {
    guest_start --queues 2
    reads_well
}
killed_repeatedly() {
    load_in_background
    killed
    for _ in 1 2; do
        guest_start --queues 2
        load_in_background
        killed
    done
    nothing_left
}
backend_restarts() {
    guest_start --queues 2 --reconnect 500
    reads_well
    backend_stop
    backend_start --queues 2
    within 20 logged 'region .* mapped'
    reads_well
}
ends_under_load() {
    load_in_background
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status"
    # The requests have ended by themselves. A ring that waits for its time-out resets the device.
    equal 0 "$(statistic recoveries)" "resets of the device"
    [ ! -e "$SOCKET" ]
    logged 'shut down'
}

backend_start --queues 2 || exit
pinned >/run/pinned-before
descriptors >/run/descriptors-before
guest_start --queues 2 --allow-reset || exit
claim "a guest finds its disk again after a reset" reset
claim "requests survive stopping and continuing the machine, and data verify" stopped_and_continued
claim "a second virtual machine is refused, and the message names the first one" second_refused
claim "a virtual machine killed with requests in flight leaves no pin and no descriptor" killed_under_load
claim "the next virtual machine finds a working disk" next_one
claim "virtual machines killed repeatedly leave nothing behind" killed_repeatedly
claim "QEMU reconnects to a restarted backend, and the guest continues" backend_restarts
claim "SIGTERM under load ends the backend cleanly, without waiting for a time-out" ends_under_load
guest kill
finished
