#!/bin/sh
# profiles: vtd
# Run it by hand; it takes too long for scripts/test, which runs the shorter tests/host/load.sh:
#   scripts/testbed run $(sed -n 's/^# options: //p' tests/long/load.sh) --add tests/long/load.sh:/load.sh -- sh /load.sh
# options: --timeout 3600 --drive-size 128M --qemu-arg -drive --qemu-arg if=none,id=other,snapshot=on,format=raw,file.driver=null-co,file.size=128M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme,serial=other,drive=other,addr=5,logical_block_size=4096,physical_block_size=4096
# Requests of every kind and size, each checked, with every combination of ring, page and block, and the events in the life of a
# virtual machine under this load. "sh /load.sh PART…" runs parts of it: 512, lives, 4096.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

# matrix BLOCK: all combinations with this block size, on $FUNCTION.
matrix() {
    backend_start --queues 2 || exit
    record_resources
    for pair in split/4K packed/4K split/2M packed/2M; do
        claim "${pair%/*} ring, pages of ${pair#*/}, blocks of $1: data verify, and a kill leaves nothing" \
            stress_combination "${pair%/*}" "${pair#*/}" "$1"
    done
    backend_stop
}

killed_repeatedly() {
    for _ in $(seq 12); do
        guest_start --mem 128M --hugepages --add stress
        killed_under_stress --threads 16
    done
}
backend_restarts() {
    guest_start --queues 2 --smp 2 --mem 160M --hugepages --reconnect 200 --add stress
    stress_start 600
    for _ in 1 2; do
        backend_stop
        backend_start --queues 2
        within 20 logged 'region .* mapped'
        stress_progresses
    done
    stress_stop
    stress_result
}
stopped_and_continued() {
    stress_start 600 --seed 2
    for _ in 1 2 3; do
        guest qmp stop
        guest qmp cont
        stress_progresses
    done
    stress_stop
    stress_result
    guest stop
}
reset() {
    guest_start --queues 2 --smp 2 --mem 160M --hugepages --allow-reset --add stress
    stress_start 600
    guest qmp system_reset
    guest ready
    stress_start 4 --seed 3
    stress_result
    guest stop
}
lives() {
    backend_start --queues 2 || exit
    record_resources
    claim "virtual machines killed one after the other under load leave no pin and no descriptor" \
        killed_repeatedly
    claim "QEMU reconnects to a backend restarted under load, no request fails and data verify" backend_restarts
    claim "a guest stopped and continued under load keeps running, and data verify" stopped_and_continued
    claim "a guest reset under load finds its disk again, and data verify" reset
    backend_stop
    claim "with 4 queues of 256 the backend needs at most 24 MiB besides the guest's memory" small_with_four_queues
    echo "# besides the guest's memory: $(cat /run/own) kB"
}

: >/run/killed
[ $# -gt 0 ] || set -- 512 lives 4096
for part; do
    case $part in
    512) matrix 512 ;;
    lives) lives ;;
    4096)
        FUNCTION=0000:00:05.0
        bind_to_vfio "$FUNCTION"
        matrix 4096
        ;;
    esac
done
echo "# virtual machines killed under load: $(wc -l </run/killed)"
finished
