#!/bin/sh
# profiles: vtd
# minutes: 1.2
# boot: life
# options: --iops 800
# The program is replaced under a running guest with a load that checks itself. Guest memory stays pinned, and QEMU sees no
# disconnect. tests/host/hand_over_space.sh has the other kinds of IOMMU and the flushing regime.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

three_times() {
    for n in 1 2 3; do
        hand_over "successor-$n" --queues 2 || return
        stress_progresses || return
    done
}
qemu_saw_nothing() {
    equal 0 "$(grep -ciE 'vhost|disconnect|fail' /run/guest-guest/qemu.log)" "lines about it in QEMU's log"
}
other_queues_refused() {
    now
    successor_start refused --queues 3
    within 20 test -s /run/refused.status
    equal 1 "$(cat /run/refused.status)" "exit status"
    grep -q 'this process has --queues 2, the successor 3' /run/refused.log
    logged 'may not take over: this process has --queues 2, the successor 3'
    stress_progresses
}
stopped_successor() {
    now
    stopped_while_taking_over "$1" "$2" --queues 2
    stress_progresses
}
by_signal() {
    now
    kill -USR2 "$(cat "$BACKEND_PID")"
    within 30 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status of the predecessor"
    sed -n 's/.*handed over to process \([0-9]*\),.*/\1/p' "$BACKEND_LOG" >/run/by-signal.pid
    cp "$BACKEND_LOG" /run/by-signal.log
    became by-signal
    stress_progresses
}
data_verify() {
    stress_stop
    stress_result
}
nothing_left() {
    now
    guest stop
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 gone
    equal "$(cat /run/pinned-before)" "$(pages_pinned)" "pages pinned"
    [ ! -e "$SOCKET" ] && [ ! -e "$HANDOVER" ]
}
gone() { [ ! -e "/proc/$(cat "$BACKEND_PID")" ]; }

pages_pinned >/run/pinned-before
echo backend >/run/now
backend_start --queues 2 --handover-socket "$HANDOVER" || exit
guest_start --queues 2 --smp 2 --mem 160M --hugepages --add stress || exit
stress_start 600
claim "three successors in a row take over under load, and guest memory stays pinned" three_times
claim "QEMU has seen no disconnect" qemu_saw_nothing
claim "a successor with other queues is refused, and the load goes on" other_queues_refused
claim "the load goes on when a successor is killed while it takes over" stopped_successor KILL gone
claim "the load goes on when a successor is stopped while it takes over" stopped_successor STOP silent
claim "SIGUSR2 starts the installed program, which takes over" by_signal
claim "the guest's data verify" data_verify
claim "at the end nothing is pinned, and no socket is left" nothing_left
sed -n 's/.*taken over; requests/# taken over; requests/p' /run/successor-*.log /run/by-signal.log
finished
