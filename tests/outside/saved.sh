#!/usr/bin/env bash
# minutes: 1
# A guest of stock QEMU is saved to a file under a load that checks itself, and another QEMU goes on with it on the same backend.
# QEMU runs under TCG, directly on this machine, with the emulated drive. SAVES says how often for each layout of rings.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
TESTBED_ROOT=$PWD
TESTBED_DIR=$TESTBED_ROOT/tests/testbed
# shellcheck source=tests/testbed/lib.sh
. "$TESTBED_DIR/lib.sh"
# shellcheck source=tests/testbed/kernel.sh
. "$TESTBED_DIR/kernel.sh"
# shellcheck source=tests/testbed/image.sh
. "$TESTBED_DIR/image.sh"
# shellcheck source=tests/testbed/claims.sh
. "$TESTBED_DIR/claims.sh"

SAVES=${SAVES:-2}
BACKEND=${CARGO_TARGET_DIR:-$TESTBED_ROOT/target}/release/vhost-device-vfio
WORK=$(mktemp -d)
SOCKET=$WORK/disk.sock
STATE=$WORK/state
PATH=${CARGO_TARGET_DIR:-$TESTBED_ROOT/target}/release:$PATH

# Kills what was started here, by process id.
clean_up() {
    local file
    for file in "$WORK"/*.pid "$WORK"/guest-*/pid; do
        [[ ! -s $file ]] || kill -9 "$(<"$file")" 2>/dev/null
    done
    rm -rf "$WORK"
}
trap clean_up EXIT
# shellcheck source=tests/testbed/native_guest.sh
. "$TESTBED_DIR/native_guest.sh"

backend_starts() {
    (
        exec "$BACKEND" --socket-path "$SOCKET" --device "emulated:size=64M,latency=200us,order=random" --queues 2
    ) </dev/null >>"$WORK/backend.log" 2>&1 &
    echo $! >"$WORK/backend.pid"
    within 20 test -S "$SOCKET"
}
backend_ends() {
    kill -TERM "$(<"$WORK/backend.pid")"
    within 20 test ! -S "$SOCKET"
    within 20 grep -q 'statistics: ' "$WORK/backend.log"
    rm "$WORK/backend.pid"
    contains 'errors=0 ' "$WORK/backend.log"
    lacks 'ERROR' "$WORK/backend.log"
    lacks 'refused: ' "$WORK/backend.log"
}

# start [OPTION of "guest start"]…
start() { guest start --socket "$SOCKET" --queues 2 --smp 2 --mem 128M --timeout 180 --add stress "$@"; }
inside() { guest exec --timeout 300 -- "$1"; }

guest_boots_with_load() {
    start --blk "packed=$1"
    inside '(stress /dev/vda --until /tmp/enough --seconds 3000 --threads 32 >/tmp/stress.log 2>&1; echo $? >/tmp/stressed) \
        >/dev/null 2>&1 &
        until grep -qs "^ended=[1-9]" /tmp/stress.log; do [ ! -e /tmp/stressed ] || { cat /tmp/stress.log; exit 1; }; sleep 0.2; done'
}
progresses() {
    inside 'n=$(grep -c ^ended= /tmp/stress.log); then=$(tail -n 1 /tmp/stress.log)
        until [ "$(grep -c ^ended= /tmp/stress.log)" -gt $((n + 2)) ]; do [ ! -e /tmp/stressed ] || exit 1; sleep 0.2; done
        [ "$(tail -n 1 /tmp/stress.log | cut -d " " -f 1)" != "${then%% *}" ]'
}

migration_is() { guest qmp query-migrate | grep -q "\"status\": \"$1\""; }
# saved_and_back OPTION…: the guest is saved while the load runs, and the next QEMU goes on.
saved_and_back() {
    local before
    before=$(grep -c 'dirty pages are logged' "$WORK/backend.log" || true)
    # Slow enough that the load dirties pages again that are saved already.
    guest qmp migrate-set-parameters '{"max-bandwidth":60000000,"downtime-limit":400}'
    guest qmp migrate "{\"uri\":\"file:$STATE\"}"
    within 120 migration_is completed || { guest qmp query-migrate; return 1; }
    guest qmp query-migrate | sed 's/.*"downtime": \([0-9]*\).*"dirty-sync-count": \([0-9]*\).*/# downtime \1 ms, \2 rounds/'
    equal $((before + 1)) "$(grep -c 'dirty pages are logged' "$WORK/backend.log")" "times that pages were logged"
    guest qmp quit
    guest wait
    start --incoming "file:$STATE" "$@"
    progresses
}
saved_several_times() {
    local n
    for ((n = 0; n < SAVES; n++)); do saved_and_back --blk "packed=$1" || return; done
}
data_are_right() {
    inside ': >/tmp/enough; while [ ! -e /tmp/stressed ]; do sleep 0.5; done
        tail -n 1 /tmp/stress.log; [ "$(cat /tmp/stressed)" = 0 ] && ! dmesg | grep -iE "i/o error|blk_update_request"'
    guest stop
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
