#!/usr/bin/env bash
# minutes: 1
# A guest of stock QEMU with two disks is saved to a file under a load on both that checks itself, and another QEMU goes on with it
# on the same backends. One disk has split rings, the other packed ones. QEMU runs under TCG, directly on this machine, with
# emulated drives. SAVES says how often.
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

DISKS='vda vdb'
THREADS=16

both() {
    local backend
    for backend in split packed; do "$@" "$backend" || return; done
}
with_two_disks() {
    start --blk packed=off --qemu-arg -chardev --qemu-arg "socket,id=vhost1,path=$WORK/packed.sock" --qemu-arg -device \
        --qemu-arg 'vhost-user-blk-pci,id=packed,chardev=vhost1,num-queues=2,packed=on' "$@"
}
# VIRTIO_F_RING_PACKED is bit 34.
has_both_layouts() { inside '[ "$(cut -c 35 /sys/block/vda/device/features /sys/block/vdb/device/features | tr -d "\n")" = 01 ]'; }
boots() { with_two_disks && has_both_layouts && load_begins; }

times_logged() { grep -c 'dirty pages are logged' "$WORK/$1.log" || true; }
# saved_and_back: the guest is saved while the load runs, and the next QEMU goes on.
saved_and_back() {
    local split packed
    split=$(times_logged split) packed=$(times_logged packed)
    # Slow enough that the load dirties pages again that are saved already.
    the_guest qmp migrate-set-parameters '{"max-bandwidth":60000000,"downtime-limit":400}'
    the_guest qmp migrate "{\"uri\":\"file:$STATE\"}"
    within 120 migration_is completed || { the_guest qmp query-migrate; return 1; }
    the_guest qmp query-migrate | sed 's/.*"downtime": \([0-9]*\).*"dirty-sync-count": \([0-9]*\).*/# downtime \1 ms, \2 rounds/'
    equal "$((split + 1)) $((packed + 1))" "$(times_logged split) $(times_logged packed)" "times that pages were logged"
    the_guest qmp quit
    the_guest wait
    with_two_disks --incoming "file:$STATE"
    progresses
}
saved_several_times() {
    local n
    for ((n = 0; n < SAVES; n++)); do saved_and_back || return; done
}

SOCKET=$WORK/split.sock
prepare_guest
claim "two backends start" both named_backend_starts
claim "a guest runs a load on split and on packed rings" boots
claim "it is saved to a file $SAVES times, and the next QEMU goes on" saved_several_times
claim "all data that it has read are right" data_are_right
claim "the backends end without errors" both named_backend_ends
finished
