#!/usr/bin/env bash
# Saves a guest of stock QEMU to a file under load, and moves it to another QEMU, with this program and with qemu-storage-daemon, in
# turns: the most pages that QEMU found dirty in a second, its downtime, its total time, the rounds and the bytes that it sent. Both
# programs have a disk in memory. A guest moves from one qemu-storage-daemon to a second one on the same file, because it serves one
# QEMU; this program serves both. Run it by hand, on an idle machine: tests/long/compared.sh [ROUNDS]. QEMU runs under TCG, so only
# the ratios say something.
# shellcheck disable=SC2317 # functions are called by name
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh
WORK=$(mktemp -d)
# shellcheck source=tests/testbed/native_load.sh
. "$TESTBED_DIR/native_load.sh"

MIGRATION=$WORK/migration.sock
# QEMU counts dirty pages once a second, so a round must take longer.
SLOW='{"max-bandwidth":12000000,"downtime-limit":600}'

this_program() { exec "$BACKEND" --socket-path "$SOCKET" --device emulated:size=64M --queues 2 --successor; }
storage_daemon() {
    exec qemu-storage-daemon --blockdev "driver=file,node-name=disk,filename=$DISK,locking=off" \
        --export "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path=$SOCKET"
}
DISK=/dev/shm/compared-$$
trap 'rm -f "$DISK"; clean_up' EXIT

# serve_by PROGRAM NAME: its socket is WORK/NAME.sock, its process WORK/NAME.pid.
serve_by() {
    SOCKET=$WORK/$2.sock
    "$1" </dev/null >>"$WORK/$2.log" 2>&1 &
    echo $! >"$WORK/$2.pid"
    within 20 listens "$SOCKET"
}
# under_load PROGRAM: it serves a guest that has run the load for 5 s.
under_load() {
    rm -f "$WORK"/*.sock "$DISK"
    truncate -s 64M "$DISK"
    serve_by "$1" backend
    GUEST=guest
    guest_boots_with_load off
    sleep 5
}
# migrated WHAT PROGRAM URI PARAMETERS
migrated() {
    the_guest qmp migrate-set-parameters "$4" >/dev/null
    the_guest qmp migrate "{\"uri\":\"$3\"}" >/dev/null
    local rate most=0
    until migration_is completed; do
        rate=$(the_guest qmp query-migrate | sed -n 's/.*"dirty-pages-rate": \([0-9]*\).*/\1/p')
        ((${rate:-0} <= most)) || most=$rate
        sleep 0.1
    done
    echo "$1 $2 dirty-pages-rate=$most $(the_guest qmp query-migrate | tr ',{' '\n' | sed -n \
        's/.*"\(downtime\|total-time\|dirty-sync-count\|transferred\)": \([0-9]*\).*/\1=\2/p' | tr '\n' ' ')"
}
ends() {
    local name
    the_guest qmp quit >/dev/null
    the_guest wait
    for name; do kill "$(<"$WORK/$name.pid")" && rm "$WORK/$name.pid"; done
    wait
}

save() {
    under_load "$1"
    migrated save "$1" "file:$WORK/state" "$SLOW"
    ends backend
}
move() {
    under_load "$1"
    local starting others=(backend)
    if [[ $1 == storage_daemon ]]; then serve_by "$1" second && others+=(second); fi
    (GUEST=next && start --incoming "unix:$MIGRATION" --blk packed=off) >/dev/null 2>&1 &
    starting=$!
    # QEMU listens after it has connected to the disk.
    within 60 listens "$MIGRATION"
    migrated move "$1" "unix:$MIGRATION" "$SLOW"
    wait "$starting"
    the_guest qmp quit >/dev/null
    the_guest wait
    GUEST=next
    progresses || echo "move $1: the guest does not go on"
    ends "${others[@]}"
}

prepare_guest
for ((round = 0; round < ${1:-3}; round++)); do
    for what in save move; do
        "$what" this_program
        "$what" storage_daemon
    done
done
