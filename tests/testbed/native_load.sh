# shellcheck shell=bash
# A guest of stock QEMU under a load that checks itself, with the backend on this machine. QEMU runs under TCG, the drive is the
# emulated one. The files of both are in WORK. Needs tests/outside/lib.sh; the guest is named GUEST.
# shellcheck disable=SC2317 # functions are called by name, through claim

SOCKET=$WORK/backend.sock
GUEST=guest
trap clean_up EXIT
# shellcheck source=tests/testbed/native_guest.sh
. "$TESTBED_DIR/native_guest.sh"

# backend_starts [OPTION]…
backend_starts() { serve backend --device "emulated:size=64M,latency=200us,order=random" --queues 2 "$@"; }
backend_ends() {
    stop backend
    contains 'errors=0 ' "$WORK/backend.log"
    lacks 'ERROR' "$WORK/backend.log"
    lacks 'refused: ' "$WORK/backend.log"
}

the_guest() { guest --name "$GUEST" "$@"; }
# start [OPTION of "guest start"]…
start() { the_guest start --socket "$SOCKET" --queues 2 --smp 2 --mem 128M --timeout 180 --add stress "$@"; }
inside() { the_guest exec --timeout 300 -- "$1"; }

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
migration_is() { the_guest qmp query-migrate | grep -q "\"status\": \"$1\""; }
data_are_right() {
    inside ': >/tmp/enough; while [ ! -e /tmp/stressed ]; do sleep 0.5; done
        tail -n 1 /tmp/stress.log; [ "$(cat /tmp/stressed)" = 0 ] && ! dmesg | grep -iE "i/o error|blk_update_request"'
    the_guest stop
}
