# shellcheck shell=bash
# A guest of stock QEMU under a load that checks itself, with the backend on this machine. QEMU runs under TCG, the drive is the
# emulated one. The files of both are in WORK. Needs tests/outside/lib.sh; the guest is named GUEST.
# shellcheck disable=SC2317 # functions are called by name, through claim

SOCKET=$WORK/backend.sock
GUEST=guest
# The disks of the guest that are under load, and the requests in flight on each.
DISKS=vda
THREADS=32
trap clean_up EXIT
# shellcheck source=tests/testbed/native_guest.sh
. "$TESTBED_DIR/native_guest.sh"

# backend_starts [OPTION]…
backend_starts() { named_backend_starts backend "$@"; }
# named_backend_starts NAME [OPTION]…: as "serve" does, with an emulated drive.
named_backend_starts() {
    local name=$1
    shift
    serve "$name" --device "emulated:size=64M,latency=200us,order=random" --queues 2 "$@"
}
backend_ends() { named_backend_ends backend; }
named_backend_ends() {
    stop "$1"
    contains 'errors=0 ' "$WORK/$1.log"
    lacks 'ERROR' "$WORK/$1.log"
    lacks 'refused: ' "$WORK/$1.log"
}

the_guest() { guest --name "$GUEST" "$@"; }
# start [OPTION of "guest start"]…
start() {
    the_guest start --socket "$SOCKET" --queues 2 --smp 2 --mem 128M --timeout 180 --add stress "$@"
}
inside() { the_guest exec --timeout 300 -- "$1"; }

guest_boots_with_load() {
    start --blk "packed=$1"
    load_begins
}
load_begins() {
    inside "for disk in $DISKS; do
            (stress /dev/\$disk --until /tmp/enough --seconds 3000 --threads $THREADS >/tmp/\$disk.log 2>&1
            echo \$? >/tmp/\$disk.stressed) >/dev/null 2>&1 &
        done
        for disk in $DISKS; do
            until grep -qs '^ended=[1-9]' /tmp/\$disk.log; do
                [ ! -e /tmp/\$disk.stressed ] || { cat /tmp/\$disk.log; exit 1; }
                sleep 0.2
            done
        done"
}
progresses() {
    inside "for disk in $DISKS; do"'
            n=$(grep -c ^ended= /tmp/$disk.log); then=$(tail -n 1 /tmp/$disk.log)
            until [ "$(grep -c ^ended= /tmp/$disk.log)" -gt $((n + 2)) ]; do [ ! -e /tmp/$disk.stressed ] || exit 1; sleep 0.2; done
            [ "$(tail -n 1 /tmp/$disk.log | cut -d " " -f 1)" != "${then%% *}" ] || exit 1
        done'
}
migration_is() { the_guest qmp query-migrate | grep -q "\"status\": \"$1\""; }
data_are_right() {
    inside ": >/tmp/enough; for disk in $DISKS; do"'
            while [ ! -e /tmp/$disk.stressed ]; do sleep 0.5; done
            tail -n 1 /tmp/$disk.log; [ "$(cat /tmp/$disk.stressed)" = 0 ] || exit 1
        done
        ! dmesg | grep -iE "i/o error|blk_update_request"'
    the_guest stop
}
