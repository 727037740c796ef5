#!/usr/bin/env bash
# minutes: 1
# A guest of stock QEMU is saved to a file under a load that checks itself, and another QEMU goes on with it on the same backend.
# QEMU runs under TCG, directly on this machine, with the emulated drive. SAVES says how often for each layout of rings.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

SAVES=${SAVES:-2}
WORK=$(mktemp -d)
STATE=$WORK/state
# shellcheck source=tests/testbed/native_load.sh
. "$TESTBED_DIR/native_load.sh"

# saved_and_back OPTION…: the guest is saved while the load runs, and the next QEMU goes on.
saved_and_back() {
    local before
    before=$(grep -c 'dirty pages are logged' "$WORK/backend.log" || true)
    # Slow enough that the load dirties pages again that are saved already.
    the_guest qmp migrate-set-parameters '{"max-bandwidth":60000000,"downtime-limit":400}'
    the_guest qmp migrate "{\"uri\":\"file:$STATE\"}"
    within 120 migration_is completed || { the_guest qmp query-migrate; return 1; }
    the_guest qmp query-migrate | sed 's/.*"downtime": \([0-9]*\).*"dirty-sync-count": \([0-9]*\).*/# downtime \1 ms, \2 rounds/'
    equal $((before + 1)) "$(grep -c 'dirty pages are logged' "$WORK/backend.log")" "times that pages were logged"
    the_guest qmp quit
    the_guest wait
    start --incoming "file:$STATE" "$@"
    progresses
}
saved_several_times() {
    local n
    for ((n = 0; n < SAVES; n++)); do saved_and_back --blk "packed=$1" || return; done
}

prepare_guest
claim "the backend starts" backend_starts
for packed in off on; do
    claim "a guest runs a load, packed=$packed" guest_boots_with_load "$packed"
    claim "it is saved to a file $SAVES times, and the next QEMU goes on" saved_several_times "$packed"
    claim "all data that it has read are right" data_are_right
done
claim "the backend ends without errors" backend_ends
finished
