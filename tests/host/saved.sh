#!/bin/sh
# profiles: vtd
# minutes: 1
# boot: plain
# A guest on KVM is saved to a file under a load that checks itself, and another QEMU goes on with it on the same backend. The drive
# is a VFIO function, whose DMA writes to guest memory without the host's knowledge. One profile is enough: the marks do not
# depend on the kind of IOMMU. tests/outside/saved.sh does it more often, with the emulated drive.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

boots_with_load() {
    guest_start --queues 2 --smp 2 --mem 128M --hugepages --add stress
    stress_start 600 --threads 32
}
completed() { guest qmp query-migrate | grep -q '"status": "completed"'; }
saved() {
    guest qmp migrate-set-parameters '{"downtime-limit":1000}'
    guest qmp migrate '{"uri":"file:/run/state"}'
    within 200 completed || { guest qmp query-migrate && return 1; }
    logged 'dirty pages are logged'
    guest qmp quit
    guest wait
    within 15 logged 'front-end disconnected'
    equal "$(cat /run/pinned-idle)" "$(pinned)" "kB pinned"
}
goes_on() {
    guest_start --queues 2 --smp 2 --mem 128M --hugepages --add stress --incoming file:/run/state
    rm /run/state
    stress_progresses
}
verifies() {
    stress_stop
    stress_result
    guest exec -- 'dmesg | grep -iE "i/o error|blk_update_request" && exit 1; exit 0'
    guest kill
}

backend_start --queues 2 || exit
pinned >/run/pinned-idle
claim "a guest runs a load" boots_with_load
claim "it is saved to a file under load" saved
claim "another QEMU goes on with it" goes_on
claim "all data that it has read are right" verifies
claim "the backend ends without errors" backend_stop
finished
