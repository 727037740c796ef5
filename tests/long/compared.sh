#!/usr/bin/env bash
# Saves a guest of stock QEMU to a file under load, with this program and with qemu-storage-daemon, in turns: QEMU's total time, its
# downtime, the pages that were dirty each second and the rounds. Both have an empty disk in memory. Run it by hand, on an idle
# machine: tests/long/compared.sh [SAVES]. QEMU runs under TCG, so only the ratios say something.
# shellcheck disable=SC2317 # functions are called by name
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh
WORK=$(mktemp -d)
# shellcheck source=tests/testbed/native_load.sh
. "$TESTBED_DIR/native_load.sh"

this_program() { exec "$BACKEND" --socket-path "$SOCKET" --device emulated:size=64M --queues 2; }
storage_daemon() {
    truncate -s 64M /dev/shm/compared-$$ && exec 5<>/dev/shm/compared-$$ && rm /dev/shm/compared-$$
    exec qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=/dev/fd/5,locking=off \
        --export "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path=$SOCKET"
}

save() {
    local n
    rm -f "$SOCKET"
    "$1" </dev/null >>"$WORK/backend.log" 2>&1 &
    echo $! >"$WORK/backend.pid"
    within 20 test -S "$SOCKET"
    guest_boots_with_load off
    for ((n = 0; n < 50; n++)); do sleep 0.1; done
    the_guest qmp migrate-set-parameters '{"max-bandwidth":60000000,"downtime-limit":400}' >/dev/null
    the_guest qmp migrate "{\"uri\":\"file:$WORK/state\"}" >/dev/null
    within 120 migration_is completed
    echo "$1 $(the_guest qmp query-migrate | tr ',' '\n' | sed -n \
        's/.*"\(downtime\|total-time\|dirty-pages-rate\|dirty-sync-count\)": \([0-9]*\).*/\1=\2/p' | tr '\n' ' ')"
    the_guest qmp quit >/dev/null
    the_guest wait
    kill "$(<"$WORK/backend.pid")"
    wait
    rm "$WORK/backend.pid"
}

prepare_guest
for ((round = 0; round < ${1:-3}; round++)); do
    save this_program
    save storage_daemon
done
