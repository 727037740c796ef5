#!/bin/sh
# profiles: vtd
# minutes: 0.8
# A guest of stock QEMU on a VFIO function is saved to a file under a load that checks itself, goes on in another QEMU, and moves to
# a third one while the backend stays. tests/outside/saved.sh and changed.sh do it more often, with the emulated drive. The
# guest has one processor: KVM on this emulation gives up some restored guests that have two (internal error, suberror 3).

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

STATE=/run/state MIGRATION=/run/migration.sock
echo guest >/run/guest-name

# The guest has another name after it has moved. Each claim runs in a shell of its own.
guest() { command guest --name "$(cat /run/guest-name)" "$@"; }
start() { guest_start --queues 2 --mem 128M --add stress "$@"; }

boots() { start && stress_start 3000 --threads 16; }
migration_is() { guest qmp query-migrate | grep -q "\"status\": \"$1\""; }
# migrated URI: slowly enough that the load dirties pages again that are saved already.
migrated() {
    before=$(times_logged 'dirty pages are logged' || true)
    guest qmp migrate-set-parameters '{"max-bandwidth":60000000,"downtime-limit":400}'
    guest qmp migrate "{\"uri\":\"$1\"}"
    within 200 migration_is completed || {
        guest qmp query-migrate
        return 1
    }
    figures=$(guest qmp query-migrate |
        sed 's/.*"downtime": \([0-9]*\).*"dirty-sync-count": \([0-9]*\).*/downtime \1 ms, \2 rounds/')
    echo "# $1: $figures" >>"$REMARKS"
    equal $((before + 1)) "$(times_logged 'dirty pages are logged')" "times that pages were logged"
}
ends() {
    guest qmp quit
    guest wait
}

saved_and_back() {
    migrated "file:$STATE"
    ends
    start --incoming "file:$STATE"
    stress_progresses
}
# The next QEMU shares its memory when the first has stopped: that is mapped for the second page table, which then replaces the first.
moved() {
    mark
    (command guest --name next start --socket "$SOCKET" --queues 2 --mem 128M --timeout 300 \
        --incoming "unix:$MIGRATION") &
    starting=$!
    within 60 logged 'front-end waits for its turn'
    within 60 test -S "$MIGRATION"
    migrated "unix:$MIGRATION"
    wait "$starting"
    within 60 logged 'has its turn: moved to its memory'
    ends
    echo next >/run/guest-name
    stress_progresses
    equal 1 "$(hits_since_mark iommufd_device_replace)" "page tables replaced"
    equal 0 "$(hits_since_mark iommufd_device_detach)" "detaches"
    sed -n 's/.*\(has its turn.*\|downtime .*\)/# \1/p' "$BACKEND_LOG" >>"$REMARKS"
}
right() {
    stress_stop
    stress_result
    guest exec -- '! dmesg | grep -iE "i/o error|blk_update_request"'
    guest stop
}
ends_well() {
    within 20 nothing_pinned_for_guests
    backend_stop
    equal 0 "$(statistic errors)" "requests failed"
    lacks ' ERROR ' "$BACKEND_LOG"
}
nothing_pinned_for_guests() { equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"; }

probe iommufd_device_replace iommufd_device_detach
backend_start --queues 2 --successor || exit
pinned >/run/pinned-before
claim "a guest runs a load on a VFIO function" boots
claim "it is saved to a file, and the next QEMU goes on" saved_and_back
claim "it moves to another QEMU, and the kernel replaces the page table once" moved
claim "all data that it has read are right" right
claim "nothing is left pinned, and the backend ends without errors" ends_well
finished
