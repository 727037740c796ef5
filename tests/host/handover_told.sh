#!/bin/sh
# profiles: vtd vtd-snoop
# minutes: 1.2
# boot: life
# options: --iops 800
# A drive under a flushing verdict, registered with the KVM of a guest: it is handed over, its process is killed, and the host
# takes it. KVM is told as long as guest memory is mapped. The shim's policy is dynamic, so that KVM is untold at once whenever a
# registration ends; with "lock" it would not show. On vtd-snoop, where KVM is not told, only the hand-over runs: the rest depends
# on nothing else of the IOMMU. Takes about 60 s of one processor, and 15 s on vtd-snoop.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

SHIM=/run/kvm.sock
export KVM_VFIO_SHIM_POLICY=dynamic
REGISTER=kvm_arch_register_noncoherent_dma
UNREGISTER=kvm_arch_unregister_noncoherent_dma
AT=/sys/bus/pci/devices/$FUNCTION
FLUSHING="--queues 2 --no-snoop assume"
TOLD="$FLUSHING --kvm-socket $SHIM"

wanted() { sed -n "s/^kvm = .*\\b$1=\\([0-9]*\\).*/\\1/p" /testbed/profile; }
# kvm_calls REGISTRATIONS UNREGISTRATIONS: what KVM has been told since the mark.
kvm_calls() {
    equal "$1" "$(hits_since_mark "$REGISTER")" "times KVM was told"
    equal "$2" "$(hits_since_mark "$UNREGISTER")" "times KVM was untold"
}
# mapped_only_while_told MAPS: guest memory has been mapped that often at least, each time after KVM was told.
mapped_only_while_told() {
    awk -v "maps=$1" -v "register=$REGISTER:" -v "unregister=$UNREGISTER:" '
        index($0, unregister) { told--; next }
        index($0, register) { told++; next }
        / guest_memory: .* iova=0x0$/ { n++; if (told != 1) early++ }
        END { print n + 0 " maps, " early + 0 " of them while KVM was not told, or told twice"; exit n < maps || early }
    ' "$TRACING/trace" || {
        grep -E "$REGISTER|$UNREGISTER|guest_memory" "$TRACING/trace"
        return 1
    }
}
serve() {
    # shellcheck disable=SC2086 # split into words
    became backend && backend_start --handover-socket "$HANDOVER" $1
}
served_again() {
    serve "$1"
    within 20 logged 'region .* mapped'
}
killed() {
    requests_recovered
    kill -KILL "$(cat "$BACKEND_PID")"
    within 20 test -s "$BACKEND_STATUS"
}

told_first() {
    now
    kvm_calls "$(wanted assume)" 0
    logged "DMA is $(sed -n 's/^verdict = assume //p' /testbed/profile)\$"
    [ "$(wanted assume)" = 0 ] || mapped_only_while_told 1
}
twice() {
    now
    mark
    for n in 1 2; do
        # shellcheck disable=SC2086 # split into words
        hand_over "successor-$n" $TOLD
        within 10 logged 'KVM shim of the process before: .* 1 device\(s\) registered'
        stress_progresses
    done
    kvm_calls 0 0
    equal 0 "$(grep -ciE 'vhost|disconnect|fail' /run/guest-guest/qemu.log)" "lines about it in QEMU's log"
}
fails() {
    now
    mark
    # shellcheck disable=SC2086 # split into words
    stopped_while_taking_over KILL gone $TOLD
    stress_progresses
    kvm_calls 0 0
}
another_socket_refused() {
    now
    # shellcheck disable=SC2086 # split into words
    successor_start refused $FLUSHING
    within 20 test -s /run/refused.status
    equal 1 "$(cat /run/refused.status)" "exit status"
    grep -q 'this process has --kvm-socket /run/kvm.sock, the successor (none)' /run/refused.log
    stress_progresses
}
killed_six_times() {
    now
    mark
    : >/run/recovered
    for n in 1 2 3 4 5 6; do
        usleep $((n * 37 % 50 * 10000))
        killed
        served_again "$TOLD"
    done
    stress_progresses
    requests_recovered
    echo "# requests submitted again: $(awk '{ n += $1 } END { print n + 0 }' /run/recovered)"
    [ -s /run/recovered ]
    mapped_only_while_told 7
    kvm_calls 6 6
}
# The guest's requests are in flight while no process has the drive, and the host has it.
taken_after_a_kill() {
    now
    : >/run/recovered
    # A load that verifies does not always have requests in flight.
    for _ in 1 2 3 4 5; do
        mark
        killed
        echo "$FUNCTION" >"$AT/driver/unbind"
        timeout 30 vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" && return 1
        bind_to_vfio "$FUNCTION"
        served_again "$TOLD"
        stress_progresses
        kvm_calls 1 1
        requests_recovered
        [ ! -s /run/recovered ] || break
    done
    [ -s /run/recovered ]
    stress_stop
    stress_result
    guest exec -- 'dmesg | grep -iE "i/o error|blk_update_request" && exit 1; exit 0'
}
# With a shim the host keeps the drive, until another process serves it.
released_and_killed() {
    now
    mark
    away
    kvm_calls 0 1
    killed
    guest exec -- 'rm -f /tmp/read
        (dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct && : >/tmp/read) >/dev/null 2>&1 &'
    bind_to_vfio "$FUNCTION"
    served_again "$TOLD"
    within 60 guest exec -- '[ -e /tmp/read ]'
    verify --size=4M
    kvm_calls 1 1
    mapped_only_while_told 9
}

reads_fail() { guest exec --timeout 30 -- '! dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null'; }
# away: the host takes the drive, and requests fail.
away() {
    timeout 15 sh -c "echo $FUNCTION >$AT/driver/unbind"
    within 20 logged 'the host wants the device back'
    reads_fail
    equal 0 "$(pinned)" "kB pinned while the drive is away"
}
refused_while_away() {
    now
    killed
    served_again "$FLUSHING"
    away
    # shellcheck disable=SC2086 # split into words
    successor_start early $FLUSHING
    within 30 test -s /run/early.status
    equal 1 "$(cat /run/early.status)" "exit status"
    grep 'the drive is away or does not answer, so it cannot be handed over' /run/early.log
    logged 'not handed over .*the drive is away.*; going on'
    reads_fail
    bind_to_vfio "$FUNCTION"
    within 30 logged 'the device is back'
    # shellcheck disable=SC2086 # split into words
    hand_over late $FLUSHING
    verify --size=4M
}

# A process without CAP_IPC_LOCK, whose locked memory is limited to twice the guest's memory and some buffers.
account_moves() {
    now
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 test ! -e "/proc/$(cat "$BACKEND_PID")"
    chmod 666 /dev/iommu /dev/vfio/devices/*
    chmod 777 /run
    echo 'nobody:x:65534:65534::/run:/bin/sh' >>/etc/passwd
    AS=as_nobody
    # shellcheck disable=SC3045 # busybox has it
    ulimit -l 360448
    # The first of them has no predecessor, and is started in the same way.
    first_of_nobody
    grep -q '^CapEff:[[:space:]]*0000000000000000$' "/proc/$(cat "$BACKEND_PID")/status"
    locked=$(pinned)
    [ "$locked" -gt 163840 ]
    # shellcheck disable=SC2086 # split into words
    hand_over second-of-nobody $FLUSHING
    within 10 equal "$locked" "$(pinned)" "kB pinned by the successor"
    verify --size=4M
}
as_nobody() { su -c 'exec "$@"' -- nobody - "$@"; }
first_of_nobody() {
    : >/run/first-of-nobody.log
    # shellcheck disable=SC2086 # split into words
    (
        status=0
        as_nobody sh -c 'echo $$ >/run/first-of-nobody.pid; exec "$@"' - vhost-device-vfio --socket-path "$SOCKET" \
            --handover-socket "$HANDOVER" --device "$FUNCTION" $FLUSHING || status=$?
        echo $status >/run/first-of-nobody.status
    ) </dev/null >>/run/first-of-nobody.log 2>&1 &
    became first-of-nobody
    within 30 logged 'region .* mapped'
}
nothing_left() {
    now
    guest stop
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 test ! -e "/proc/$(cat "$BACKEND_PID")"
    equal "$(cat /run/pinned-before)" "$(pages_pinned)" "pages pinned"
    equal "$(hits "$REGISTER")" "$(hits "$UNREGISTER")" "times KVM was untold, of those it was told"
    [ ! -e "$SOCKET" ] && [ ! -e "$HANDOVER" ]
}
unregistered_at_the_end() {
    now
    stress_stop
    stress_result
    mark
    nothing_left
    kvm_calls 0 "$(wanted assume)"
}

probe "$REGISTER" "$UNREGISTER"
echo 'p:guest_memory iommufd_ioas_map_file iova=+32(+24(%di)):x64' >>$TRACING/kprobe_events
echo 1 >$TRACING/events/kprobes/guest_memory/enable
pages_pinned >/run/pinned-before
mark
serve "$TOLD" || exit
guest_start --shim "$SHIM" --queues 2 --smp 2 --mem 160M --hugepages --reconnect 100 --add stress || exit
stress_start 600
claim "KVM is told as the profile says, before guest memory is mapped" told_first
claim "two successors in a row keep the registration: KVM is neither untold nor told again" twice
if [ "$PROFILE" != vtd ]; then
    claim "the last process ends, and nothing is pinned" unregistered_at_the_end
    finished
fi
claim "a successor that is killed while it takes over leaves the registration to its predecessor" fails
claim "a successor without the shim's socket is refused" another_socket_refused
claim "a process that is killed six times: KVM is told before guest memory is mapped again" killed_six_times
claim "requests in flight at a kill wait while the host has the drive, and the guest's data verify" taken_after_a_kill
claim "a process killed while the host has the drive: the next one serves what the guest asked meanwhile" released_and_killed
claim "a drive that is away is not handed over; it comes back to its process, and is handed over then" refused_while_away
claim "the account of guest memory moves to a successor without privileges" account_moves
claim "the last process ends: KVM is untold as often as it was told, and nothing is pinned" nothing_left
finished
