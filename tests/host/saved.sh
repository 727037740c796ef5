#!/bin/sh
# profiles: vtd
# minutes: 0.8
# A guest of stock QEMU on a VFIO function is under a load that checks itself, and the backend stays: the guest is given to another QEMU
# by cpr-transfer, saved to a file and restored, and migrated. tests/outside/saved.sh and changed.sh do it more often, with the
# emulated drive. The guest has one processor: KVM on this emulation gives up some restored guests that have two (internal error,
# suberror 3).

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

STATE=/run/state MIGRATION=/run/migration.sock CPR=/run/cpr.sock
echo guest >/run/guest-name

# The guest has another name after it has moved. Each claim runs in a shell of its own.
guest() { command guest --name "$(cat /run/guest-name)" "$@"; }
start() { guest_start --queues 2 --mem 128M --add stress "$@"; }

boots() { start --cpr "$CPR" && stress_start 3000 --threads 16; }
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
# start_next NAME [OPTION]…: its QEMU waits for the guest. goes_on_in NAME: it has it.
start_next() {
    name=$1
    shift
    turns=$(times_logged 'has its turn' || true)
    (command guest --name "$name" start --socket "$SOCKET" --queues 2 --mem 128M --timeout 300 \
        --incoming "unix:$MIGRATION" "$@") &
    starting=$!
}
goes_on_in() {
    wait "$starting"
    within 60 logged_more_than "$turns" 'has its turn'
    ends
    echo "$1" >/run/guest-name
    stress_progresses
    grep -oE 'has its turn.*|downtime [0-9].*' "$BACKEND_LOG" | tail -n 2 | sed 's/^/# /' >>"$REMARKS"
}
# The next QEMU has the memory of the first: what is pinned and mapped stays as it is. Only the driver's buffers are copied to the
# second address space, before it is known that it is not needed.
preserved() {
    pinned >/run/pinned-with-guest
    mark
    start_next second --cpr "$CPR"
    within 60 listens "$CPR"
    guest cpr "$MIGRATION" "$CPR"
    within 60 migration_is completed
    goes_on_in second
    for entry in iommufd_device_replace iommufd_device_detach iommufd_ioas_map_file iommufd_ioas_map iommufd_ioas_unmap; do
        equal 0 "$(hits_since_mark "$entry")" "$entry"
    done
    hits_since_mark iommufd_ioas_copy >/run/buffers-copied
    within 20 pinned_as_before
}
pinned_as_before() { equal "$(cat /run/pinned-with-guest)" "$(pinned)" "kB pinned"; }
# The next QEMU shares its memory when the first has stopped: that is mapped for the second page table, which then replaces the first.
moved() {
    mark
    start_next third
    within 60 logged_more_than "$turns" 'front-end waits for its turn'
    within 60 listens "$MIGRATION"
    migrated "unix:$MIGRATION"
    goes_on_in third
    equal 1 "$(hits_since_mark iommufd_device_replace)" "page tables replaced"
    equal 0 "$(hits_since_mark iommufd_device_detach)" "detaches"
    equal "$(cat /run/buffers-copied)" "$(hits_since_mark iommufd_ioas_copy)" "mappings copied, which were all buffers before, too"
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

probe iommufd_device_replace iommufd_device_detach iommufd_ioas_map_file iommufd_ioas_map iommufd_ioas_copy iommufd_ioas_unmap
backend_start --queues 2 --successor || exit
pinned >/run/pinned-before
claim "a guest runs a load on a VFIO function" boots
claim "it is given to another QEMU by cpr-transfer, and nothing is mapped or unmapped for it" preserved
claim "it is saved to a file, and the next QEMU goes on" saved_and_back
claim "it moves to another QEMU, and the kernel replaces the page table once" moved
claim "all data that it has read are right" right
claim "nothing is left pinned, and the backend ends without errors" ends_well
finished
