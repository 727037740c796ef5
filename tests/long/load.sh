#!/bin/sh
# profiles: vtd
# By hand, it is too long for scripts/test, where tests/host/load.sh is a part of it:
#   scripts/testbed run $(sed -n 's/^# options: //p' tests/long/load.sh) --add tests/long/load.sh:/load.sh -- sh /load.sh
# options: --timeout 3600 --drive-size 128M --qemu-arg -drive --qemu-arg if=none,id=other,snapshot=on,format=raw,file.driver=null-co,file.size=128M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme,serial=other,drive=other,addr=5,logical_block_size=4096,physical_block_size=4096
# Requests of every kind and size, each checked, with each of ring, page and block, and all that happens to a virtual machine
# meanwhile. "sh /load.sh PART…" is some of it: 512, lives, 4096.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

# matrix BLOCK: on $FUNCTION.
matrix() {
    backend_start --queues 2 || exit
    remember_what_is_held
    for pair in split/4K packed/4K split/2M packed/2M; do
        claim "${pair%/*} ring, pages of ${pair#*/}, blocks of $1: data verify, and a kill leaves nothing" \
            stress_combination "${pair%/*}" "${pair#*/}" "$1"
    done
    backend_stop
}

killed_again_and_again() {
    for _ in $(seq 12); do
        guest_start --mem 128M --hugepages --add stress
        killed_under_stress --threads 16
    done
}
backend_restarts() {
    guest_start --queues 2 --smp 2 --mem 160M --hugepages --reconnect 200 --add stress
    stressing 600
    for _ in 1 2; do
        backend_stop
        backend_start --queues 2
        within 20 logged 'region .* mapped'
        stress_goes_on
    done
    stress_enough
    stressed
}
stopped_and_continued() {
    stressing 600 --seed 2
    for _ in 1 2 3; do
        guest qmp stop
        guest qmp cont
        stress_goes_on
    done
    stress_enough
    stressed
    guest stop
}
reset() {
    guest_start --queues 2 --smp 2 --mem 160M --hugepages --allow-reset --add stress
    stressing 600
    guest qmp system_reset
    guest ready
    stressing 4 --seed 3
    stressed
    guest stop
}
lives() {
    backend_start --queues 2 || exit
    remember_what_is_held
    claim "virtual machines killed one after the other under load leave no pin and no descriptor" \
        killed_again_and_again
    claim "a backend restarted under load is found again, no request fails and data verify" backend_restarts
    claim "a guest stopped and continued under load goes on, and data verify" stopped_and_continued
    claim "a guest reset under load finds its disk again, and data verify" reset
    backend_stop
    claim "with 4 queues of 256 the backend needs at most 24 MiB beside the guest's memory" small_with_four_queues
    echo "# beside the guest's memory: $(cat /run/own) kB"
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
