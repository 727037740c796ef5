#!/usr/bin/env bash
# minutes: 1.5
# A guest of stock QEMU moves to another QEMU on the same machine under a load that checks itself, and the backend stays: once by
# cpr-transfer, then by migration, for which the second QEMU connects while the first is served. QEMU runs under TCG, directly on
# this machine, with the emulated drive. CHANGES says how often for each layout of rings.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

CHANGES=${CHANGES:-2}
WORK=$(mktemp -d)
MIGRATION=$WORK/migration.sock CPR=$WORK/cpr.sock
# shellcheck source=tests/testbed/native_load.sh
. "$TESTBED_DIR/native_load.sh"
echo guest-0 >"$WORK/name"

# Each claim runs in a shell of its own.
now() { GUEST=$(<"$WORK/name"); }
boots() { now && start --cpr "$CPR" --blk "packed=$1" && load_begins; }

# The log is limited, so its lines cannot be counted.
status() { "$BACKEND" ctl --socket "$WORK/control" --json status; }
served() { status | sed -n 's/.*"front_ends_served": *\([0-9]*\).*/\1/p'; }
more_were_served() { [[ $(served) -gt $1 ]]; }
somebody_waits() { status | grep -q '"next_front_end": *"'; }
nobody_waits() { status | grep -q '"next_front_end": *null'; }

by_migration() {
    within 60 somebody_waits || return
    within 60 listens "$MIGRATION" || return
    the_guest qmp migrate-set-parameters '{"max-bandwidth":400000000,"downtime-limit":400}'
    the_guest qmp migrate "{\"uri\":\"unix:$MIGRATION\"}"
}
# The next QEMU connects to the backend when it has been given the memory, after the first has stopped.
by_cpr() {
    within 60 listens "$CPR" || return
    the_guest cpr "$MIGRATION" "$CPR"
}

# changed_to_next WAY LAYOUT [OPTION of "guest start"]…: the guest goes on in the next QEMU.
changed_to_next() {
    local way=$1 layout=$2 before next starting
    shift 2
    now
    before=$(served)
    next=guest-$((${GUEST#guest-} + 1))
    (GUEST=$next && start --incoming "unix:$MIGRATION" --blk "packed=$layout" "$@") &
    starting=$!
    "$way" || return
    within 120 migration_is completed || { the_guest qmp query-migrate; return 1; }
    the_guest qmp query-migrate | tr ',' '\n' | sed -n 's/.*"\(downtime\|total-time\)": \([0-9]*\).*/# QEMU: \1 \2 ms/p'
    wait "$starting" || return
    within 60 more_were_served "$before" || return
    the_guest qmp quit
    the_guest wait
    echo "$next" >"$WORK/name"
    now
    progresses
}
changed_several_times() {
    local n
    for ((n = 0; n < CHANGES; n++)); do changed_to_next by_migration "$1" || return; done
}
preserved() { changed_to_next by_cpr "$1" --cpr "$CPR"; }
# The second QEMU is killed while the first one still runs, and then the guest moves to a third.
first_goes_on() {
    local before
    now
    before=$(served)
    (GUEST=guest-999 && start --incoming "unix:$MIGRATION" --blk "packed=$1") >/dev/null 2>&1 &
    within 60 somebody_waits || return
    guest --name guest-999 kill
    within 20 nobody_waits || return
    wait
    progresses
    equal "$before" "$(served)" "front-ends served"
}
right() { now && data_are_right; }
downtimes() { sed -n 's/.*\(moved to its memory.*\|downtime .*\)/# \1/p' "$WORK/backend.log"; }

prepare_guest
claim "the backend starts" backend_starts --successor --control "$WORK/control"
for packed in off on; do
    claim "a guest runs a load, packed=$packed" boots "$packed"
    claim "it is given to another QEMU by cpr-transfer" preserved "$packed"
    claim "a second QEMU that dies while it waits changes nothing" first_goes_on "$packed"
    claim "it moves to another QEMU $CHANGES times" changed_several_times "$packed"
    claim "all data that it has read are right" right
done
downtimes
claim "the backend ends without errors" backend_ends
finished
