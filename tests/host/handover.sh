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

# became NAME: the backend is that process now.
became() {
    BACKEND_LOG=/run/$1.log BACKEND_PID=/run/$1.pid BACKEND_STATUS=/run/$1.status
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
    successor_start refused --queues 3
    within 20 test -s /run/refused.status
    equal 1 "$(cat /run/refused.status)" "exit status"
    grep -q 'this process has --queues 2, the successor 3' /run/refused.log
    logged 'may not take over: this process has --queues 2, the successor 3'
    stress_progresses
}
# A successor that is killed while it starts the controller leaves it in any state.
killed_successors() {
    for delay in 0.05 0.15 0.3 0.6; do
        successor_start killed --queues 2
        sleep "$delay"
        kill -KILL "$(cat /run/killed.pid)"
        within 20 test -s /run/killed.status
        if grep -q 'taken over; requests waited' /run/killed.log; then
            echo "# it had taken over after $delay s"
            return 1
        fi
        stress_progresses || return
    done
    echo "# times that the predecessor went on: $(times_logged '; going on')"
}
by_signal() {
    kill -USR2 "$(cat "$BACKEND_PID")"
    within 30 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status of the predecessor"
    sed -n 's/.*handed over to process \([0-9]*\),.*/\1/p' "$BACKEND_LOG" >/run/by-signal.pid
    BACKEND_PID=/run/by-signal.pid
    stress_progresses
}
data_verify() {
    stress_stop
    stress_result
}
nothing_left() {
    guest stop
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 gone
    equal "$(cat /run/pinned-before)" "$(pages_pinned)" "pages pinned"
    [ ! -e "$SOCKET" ] && [ ! -e "$HANDOVER" ]
}
gone() { [ ! -e "/proc/$(cat "$BACKEND_PID")" ]; }

pages_pinned >/run/pinned-before
backend_start --queues 2 --handover-socket "$HANDOVER" || exit
guest_start --queues 2 --smp 2 --mem 160M --hugepages --add stress || exit
stress_start 600
claim "three successors in a row take over under load, and guest memory stays pinned" three_times
claim "QEMU has seen no disconnect" qemu_saw_nothing
claim "a successor with other queues is refused, and the load goes on" other_queues_refused
claim "the load goes on when a successor is killed while it takes over" killed_successors
claim "SIGUSR2 starts the installed program, which takes over" by_signal
claim "the guest's data verify" data_verify
claim "at the end nothing is pinned, and no socket is left" nothing_left
finished
