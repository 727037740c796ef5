#!/bin/sh
# profiles: vtd
# minutes: 1.2
# boot: life
# options: --iops 800
# The program is replaced under a running guest with a load that checks itself. Guest memory stays pinned, and QEMU sees no
# disconnect. tests/host/hand_over_space.sh has the other kinds of IOMMU and the flushing regime.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

HANDOVER=/run/handover.sock

# successor_start NAME [ARGUMENT…]: starts a process that takes over. Its files are named NAME.
successor_start() {
    name=$1
    shift
    rm -f "/run/$name.status"
    : >"/run/$name.log"
    (
        status=0
        sh -c "echo \$\$ >/run/$name.pid; exec \"\$@\"" - vhost-device-vfio --socket-path "$SOCKET" \
            --handover-socket "$HANDOVER" --takeover "$HANDOVER" --device "$FUNCTION" "$@" || status=$?
        echo "$status" >"/run/$name.status"
    ) </dev/null >>"/run/$name.log" 2>&1 &
}

# became NAME: the backend is that process now. now: selects its files; each claim runs in a shell of its own.
became() { echo "$1" >/run/now && now; }
now() {
    name=$(cat /run/now)
    BACKEND_LOG=/run/$name.log BACKEND_PID=/run/$name.pid BACKEND_STATUS=/run/$name.status
}

# pages_released: pages unpinned in the whole machine since it started.
pages_released() {
    echo 1 >/proc/sys/vm/stat_refresh
    awk '$1 == "nr_foll_pin_released" { print $2 }' /proc/vmstat
}

# hand_over NAME: the backend hands over to a new process, and ends well; guest memory stays pinned.
hand_over() {
    before=$(pages_pinned) released=$(pages_released)
    successor_start "$1" --queues 2
    within 30 grep -q 'taken over; requests waited' "/run/$1.log" || {
        cat "/run/$1.log" "$BACKEND_LOG"
        return 1
    }
    within 20 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status of the predecessor"
    logged 'handed over to process'
    equal 0 "$(times_logged 'front-end disconnected|region .* unmapped')" "disconnects and unmaps in the predecessor"
    became "$1"
    sed -n 's/.*taken over; /# taken over; /p' "$BACKEND_LOG"
    released=$(($(pages_released) - released))
    echo "# pages released: $released; pinned: $before before, $(pages_pinned) after"
    # The buffers of the two processes change, 2 MiB for each queue. The guest has 40960 pages.
    [ "$released" -lt 4096 ]
    [ "$(pages_pinned)" -gt $((before - 4096)) ]
}

three_times() {
    for n in 1 2 3; do
        hand_over "successor-$n" || return
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
# A successor that is stopped while it starts the controller leaves it in any state.
stopped_successor() {
    now
    asked=$(times_logged 'asks to take over' || true)
    successor_start stopped --queues 2
    until logged_more_than "$asked" 'asks to take over'; do sleep 0.01; done
    kill "-$1" "$(cat /run/stopped.pid)"
    within 30 test -s /run/stopped.status
    grep 'taken over; requests waited' /run/stopped.log && return 1
    within 30 logged "not handed over to process .*$2.*; going on"
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
sed -n 's/.*taken over; /# taken over; /p' /run/successor-*.log /run/by-signal.log
finished
