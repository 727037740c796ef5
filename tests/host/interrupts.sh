#!/bin/sh
# profiles: vtd
# minutes: 2.5
# options: --nvme msix_qsize=1,cmb_size_mb=16 --qemu trixie-backports --function size=64M,queues=2,vectors=0,msi=4
# Interrupts by what the drive has: one MSI-X vector, INTx, none, and on another drive MSI. The first has a memory buffer too. On
# one profile: they go through the same interrupt remapping on each.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

DRIVE=$FUNCTION
MSI_DRIVE=0000:00:08.0

# interrupts: how many interrupts of the function vfio-pci has counted.
interrupts() {
    awk -v "name=($FUNCTION)" 'index($0, name) { for (cpu = 2; cpu <= 3; cpu++) sum += $cpu } END { print sum + 0 }' /proc/interrupts
}
idle() {
    sleep 1
    before=$(cpu_ticks)
    sleep 3
    # Of 300. Once a second the backend checks whether guest memory has been discarded.
    [ $(($(cpu_ticks) - before)) -le 3 ]
}
# serves WIRING [ARGUMENT…]: the backend says so, and data verify. Huge pages, because a function that is itself served over
# vfio-user has room for 4096 maps.
serves() {
    wiring=$1
    shift
    backend_start --queues 2 "$@"
    logged "queues of [0-9]* entries, $wiring, transfers"
    guest_start --queues 2 --mem 256M --hugepages
    verify --size=16M
}
stops() {
    guest stop
    backend_stop
    equal 0 "$(times_logged 'ERROR')" "errors logged"
}
# The worker of a polled drive sleeps without a time-out too while nothing is in flight; its events are asked for once a second.
polled() {
    serves 'no interrupts, polled' --interrupts poll
    equal 0 "$(interrupts)" "interrupts"
}
interrupted() { [ "$(interrupts)" -gt 10 ]; }

claim "one MSI-X vector serves the admin queue and an I/O queue, and data verify" serves 'one MSI-X vector for all'
claim "it interrupts" interrupted
claim "an idle drive costs no processor time" idle
claim "all is released at the end" stops
claim "INTx serves both, and data verify" serves 'INTx for all' --interrupts intx
claim "it interrupts" interrupted
claim "an idle drive costs no processor time" idle
claim "all is released at the end" stops
claim "without interrupts the queues are polled, and data verify" polled
claim "an idle drive costs no processor time" idle
claim "all is released at the end" stops
FUNCTION=$MSI_DRIVE
bind_to_vfio "$FUNCTION"
claim "a drive with MSI and without MSI-X has a vector for each queue, and data verify" serves 'MSI'
claim "it interrupts" interrupted
claim "all is released at the end" stops
FUNCTION=$DRIVE
finished
