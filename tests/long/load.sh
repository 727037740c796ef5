#!/bin/sh
# profiles: vtd
# By hand, it is too long for scripts/test:
#   scripts/testbed run $(sed -n 's/^# options: //p' tests/long/load.sh) --add tests/long/load.sh:/load.sh -- sh /load.sh
# options: --drive-size 128M --qemu-arg -drive --qemu-arg if=none,id=other,snapshot=on,format=raw,file.driver=null-co,file.size=128M,file.read-zeroes=on --qemu-arg -device --qemu-arg nvme,serial=other,drive=other,addr=5,logical_block_size=4096,physical_block_size=4096
# Requests of every kind and size, each checked, with every pair of ring, page and block. Each virtual machine is killed
# while such a load runs; nothing of it may stay.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

guest_killed() {
    before=$(times_logged 'front-end disconnected' || true)
    guest kill
    within 15 logged_more_than "$before" 'front-end disconnected'
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-before)" "$(descriptors)" "descriptors"
    echo 0 >/proc/sys/vm/nr_hugepages
    echo >>/run/killed
}
kills() { wc -l </run/killed; }

# combination RING PAGES
combination() {
    # Each page of 4 KiB that a guest touches first costs the emulated processor a millisecond, and each thread has many.
    packed='' huge='' depth=12
    guest kill 2>/dev/null || true # one that has failed
    [ "$1" = split ] || packed='--blk packed=on'
    [ "$2" = 4K ] || huge=--hugepages depth=128
    # shellcheck disable=SC2086 # words
    guest_start --queues 2 --smp 2 --mem 320M --add stress $packed $huge
    logged "region .* pages $2 mapped"
    stressing 5 --threads "$depth" --block "$BLOCK" --discard --seed "$((1 + $(kills)))"
    stressed
    stressing 60 --threads "$depth" --block "$BLOCK" --discard
    sleep 1
    guest_killed
}
# matrix RING/PAGES…: with these the four runs have each pair of ring, page and block; all eight take twice as long.
matrix() {
    pinned >/run/pinned-before
    descriptors >/run/descriptors-before
    for pair; do
        claim "${pair%/*} ring, pages of ${pair#*/}, blocks of $BLOCK: data verify, and a kill leaves nothing" \
            combination "${pair%/*}" "${pair#*/}"
    done
}
killed_again_and_again() {
    until [ "$(kills)" -ge 17 ]; do
        guest_start --mem 192M --hugepages --add stress
        stressing 60 --threads 16
        guest_killed
    done
}
backend_restarts() {
    guest_start --queues 2 --smp 2 --mem 320M --hugepages --reconnect 200 --add stress
    stressing 12 --threads 24
    for _ in 1 2; do
        sleep 1
        backend_stop
        backend_start --queues 2
        within 20 logged 'region .* mapped'
    done
    stressed
}
reset() {
    guest_killed
    guest_start --queues 2 --mem 320M --hugepages --allow-reset --add stress
    stressing 60 --threads 24
    guest qmp system_reset
    guest ready
    stressing 4 --threads 24 --seed 2
    stressed
}
# Anonymous memory, program text, and all buffers for the drive, whether they have been touched or not.
small() {
    guest stop
    backend_stop
    backend_start --queues 4
    buffers=$(pinned)
    guest_start --queues 4 --smp 4 --mem 320M --hugepages --blk queue-size=256 --add stress
    stressing 4 --threads 64
    stressed
    own=$(awk -v "sum=$buffers" '/^Rss(Anon|File):/ { sum += $2 } END { print sum }' "/proc/$(cat "$BACKEND_PID")/status")
    echo "$own" >/run/own
    [ "$own" -le 24576 ]
}

: >/run/killed
BLOCK=512
backend_start --queues 2 || exit
matrix split/4K packed/2M
claim "virtual machines killed again and again under load leave no pin and no descriptor" killed_again_and_again
claim "a backend restarted under load is found again, no request fails and data verify" backend_restarts
claim "a guest reset under load finds its disk again, and data verify" reset
claim "with 4 queues of 256 the backend needs at most 24 MiB beside the guest's memory" small
echo "# beside the guest's memory: $(cat /run/own) kB"
guest stop
backend_stop

FUNCTION=0000:00:05.0 BLOCK=4096
bind_to_vfio "$FUNCTION"
backend_start --queues 2 || exit
matrix packed/4K split/2M
backend_stop
claim "twenty virtual machines have been killed" equal 20 "$(kills)"
finished
