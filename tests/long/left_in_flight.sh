#!/usr/bin/env bash
# A guest of stock QEMU with inflight-migration=on is saved while its drive needs longer for a write than a stop waits, and another
# QEMU goes on with it: the write is left to the inflight region, which QEMU saves, and is done then. QEMU must be 11.1 or newer, and
# is that of trixie-backports unless TESTBED_QEMU names another one. Run it by hand: tests/long/left_in_flight.sh. It takes two minutes.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh
# shellcheck source=tests/testbed/qemu.sh
. "$TESTBED_DIR/qemu.sh"
cargo build --release --locked --workspace || exit
: "${TESTBED_QEMU:=$(fetch_qemu trixie-backports)}"

WORK=$(mktemp -d)
STATE=$WORK/state
# shellcheck source=tests/testbed/native_load.sh
. "$TESTBED_DIR/native_load.sh"

# A stop waits for 5 s.
slow_backend_starts() { serve backend --device emulated:size=64M,latency=13s --queues 2; }
boots() { start --blk "packed=$1,inflight-migration=on" && inside 'cat /sys/block/vda/size'; }
logged() { grep -c "$1" "$WORK/backend.log" || true; }
saved_with_a_write_in_flight() {
    local left again
    left=$(logged 'are left to whoever serves the ring next') again=$(logged '1 requests of the process before are submitted again')
    inside '(dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=100 oflag=direct >/tmp/dd.log 2>&1; echo $? >/tmp/dd.status) >/dev/null 2>&1 &
        sleep 1'
    the_guest qmp migrate-set-parameters '{"max-bandwidth":600000000,"downtime-limit":400}'
    the_guest qmp migrate "{\"uri\":\"file:$STATE\"}"
    within 120 migration_is completed
    the_guest qmp quit
    the_guest wait
    start --incoming "file:$STATE" --blk "packed=$1,inflight-migration=on"
    inside 'until [ -e /tmp/dd.status ]; do sleep 0.5; done
        cat /tmp/dd.log; [ "$(cat /tmp/dd.status)" = 0 ] && ! dmesg | grep -iE "i/o error"'
    equal $((left + 1)) "$(logged 'are left to whoever serves the ring next')" "rings with requests that were left"
    equal $((again + 1)) "$(logged '1 requests of the process before are submitted again')" "rings whose request was submitted again"
    the_guest stop
}

prepare_guest
claim "a slow drive is served" slow_backend_starts
for packed in off on; do
    claim "a guest boots, packed=$packed" boots "$packed"
    claim "it is saved with a write in flight, and the next QEMU has it done" saved_with_a_write_in_flight "$packed"
done
finished
