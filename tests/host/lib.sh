# shellcheck shell=sh
# For tests that run inside the emulated host: starts and stops the backend, reads its pins and its log, starts guests.
# Sourced by tests/host/*.sh, which are in /testbed/tests there.

# shellcheck source=tests/testbed/claims.sh
. /testbed/claims.sh

SOCKET=/run/backend.sock
BACKEND_LOG=/run/backend.log
BACKEND_PID=/run/backend.pid
BACKEND_STATUS=/run/backend.status
# What the log of the test is to say whatever its result.
REMARKS=/run/remarks
rm -f "$REMARKS"

# backend_start [ARGUMENT…]: serves $FUNCTION on $SOCKET; returns when the drive is up. UNDER is a program that runs the backend.
backend_start() {
    rm -f "$BACKEND_STATUS"
    # Truncate it here, not in the process below: until that runs, "logged" would read the log of the previous backend.
    : >"$BACKEND_LOG"
    (
        status=0
        # shellcheck disable=SC2086 # nothing, or a program
        sh -c "echo \$\$ >$BACKEND_PID; exec \"\$@\"" - \
            ${UNDER:-} vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" "$@" || status=$?
        echo $status >"$BACKEND_STATUS"
    ) </dev/null >>"$BACKEND_LOG" 2>&1 &
    # This includes a controller reset, on emulated processors.
    within 20 logged 'serving ' || {
        show_backend
        return 1
    }
}
# show_backend: its log, and where each of its threads waits.
show_backend() {
    cat "$BACKEND_LOG"
    waits "$(cat "$BACKEND_PID")"
}

# backend_stop: ends the backend and returns its exit status.
backend_stop() {
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 test -s "$BACKEND_STATUS" || {
        show_backend
        return 1
    }
    return "$(cat "$BACKEND_STATUS")"
}

# pinned: kB of memory the backend has pinned for DMA. IOMMU type 1 counts them as locked.
pinned() { awk '/^Vm(Pin|Lck):/ { sum += $2 } END { print sum }' "/proc/$(cat "$BACKEND_PID")/status"; }

nothing_pinned() { equal 0 "$(pinned)" "kB pinned by the backend"; }

# statistic NAME: a counter from the line that the backend logs when it ends.
statistic() { sed -n "s/.*statistics: .*\\b$1=\\([0-9]*\\).*/\\1/p" "$BACKEND_LOG" | tail -n 1; }

# guest_start [OPTION of "guest start"]…: a guest with the backend's disk as /dev/vda. The time-out is long because the host's
# processors are emulated and the real machine may be busy. A guest whose kernel spins is started once more, and that is reported.
guest_start() {
    guest start --socket "$SOCKET" --timeout 300 "$@" && return
    show_backend
    again=0
    spins || again=$?
    # Its kernel panics for that.
    guest stacks || true
    [ "$again" -eq 0 ] || return "$again"
    echo "# a guest did not come up, and a processor was busy in its kernel; it was started once more: $*" >>"$REMARKS"
    guest kill || true
    guest start --socket "$SOCKET" --timeout 300 "$@"
}
# spins: a processor is busy in the guest's kernel. A kernel that waits for its disk halts its processors, and firmware that does has
# other addresses: neither is the emulation's fault, so neither is started again.
spins() {
    for n in 1 2 3; do
        guest qmp human-monitor-command '{"command-line":"info registers -a"}' | grep -q 'RIP=ffffffff[^R]*RFL=.*HLT=0' || return 125
        sleep 1
    done
}

# descriptors: open descriptors of the backend. cpu_ticks: its processor time, in clock ticks.
descriptors() { find "/proc/$(cat "$BACKEND_PID")/fd" -mindepth 1 | wc -l; }
cpu_ticks() { awk '{ print $14 + $15 }' "/proc/$(cat "$BACKEND_PID")/stat"; }

# logged PATTERN, times_logged PATTERN: extended regular expressions, over the backend's log.
logged() {
    grep -qE -e "$1" "$BACKEND_LOG" || {
        echo "wanted in the log: $1; found:"
        tail -n 20 "$BACKEND_LOG"
        return 1
    }
}
times_logged() { grep -cE -e "$1" "$BACKEND_LOG"; }
logged_more_than() { [ "$(times_logged "$2")" -gt "$1" ]; }

# A workload that checks every byte it reads back: requests of 512 bytes to 1 MiB, 32 in flight, with flushes.
VERIFY='fio --name=verify --filename=/dev/vda --direct=1 --rw=randrw --bsrange=512-1M --blockalign=512 --size=48M
--iodepth=32 --fsync=50 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --randrepeat=0 --output=/tmp/fio.log'

# verify [OPTION…]: runs it in the guest, and shows its output if it finds a wrong byte.
verify() { guest exec --timeout 400 -- "$(echo "$VERIFY" | tr '\n' ' ') $* || { cat /tmp/fio.log; exit 1; }"; }

# verify_start [OPTION…], verify_result: the same in the background, and its result.
verify_start() {
    guest exec -- "rm -f /tmp/verified; ($(echo "$VERIFY" | tr '\n' ' ') $* >/dev/null 2>&1; echo \$? >/tmp/verified) >/dev/null 2>&1 &"
}
verify_result() {
    guest exec --timeout 400 -- 'while [ ! -e /tmp/verified ]; do sleep 1; done
        [ "$(cat /tmp/verified)" = 0 ] || { cat /tmp/fio.log; exit 1; }'
}

# probe FUNCTION…: sets kprobes. hits FUNCTION: how often the kernel has entered the function since then.
# mark, hits_since_mark FUNCTION: the same since the mark.
TRACING=/sys/kernel/tracing
probe() {
    for entry; do
        echo "p:$entry $entry" >>$TRACING/kprobe_events
        echo 1 >"$TRACING/events/kprobes/$entry/enable"
    done
}
hits() { awk -v "name=$1" '$1 == name { print $2 }' $TRACING/kprobe_profile; }
mark() { cat $TRACING/kprobe_profile >/run/marked; }
hits_since_mark() { echo $(($(hits "$1") - $(awk -v "name=$1" '$1 == name { print $2 }' /run/marked))); }

# bind_to_vfio FUNCTION: unbinds it from its driver and binds it to vfio-pci.
bind_to_vfio() {
    echo vfio-pci >"/sys/bus/pci/devices/$1/driver_override"
    [ ! -e "/sys/bus/pci/devices/$1/driver" ] || echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"
    echo "$1" >/sys/bus/pci/drivers_probe
}

# bind_to_nvme FUNCTION: binds it to the kernel's nvme driver; returns when its block device exists.
# block_device FUNCTION: the path of its block device. A kernel with multipathing has a hidden one for each path, nvme0c0n1.
bind_to_nvme() {
    echo nvme >"/sys/bus/pci/devices/$1/driver_override"
    [ "$(basename "$(readlink "/sys/bus/pci/devices/$1/driver")")" = nvme ] || {
        [ ! -e "/sys/bus/pci/devices/$1/driver" ] || echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"
        echo "$1" >/sys/bus/pci/drivers_probe
    }
    within 20 block_device "$1"
}
block_device() {
    for at in "/sys/bus/pci/devices/$1/nvme"/nvme*/nvme*n1; do
        disk=/dev/$(echo "${at##*/}" | sed 's/c[0-9]*n/n/')
        [ -b "$disk" ] && echo "$disk"
    done
}

# inflate BYTES: inflates QEMU's balloon until the guest has BYTES left.
inflate() {
    guest qmp balloon "{\"value\":$1}"
    within 60 inflated "$1"
}
inflated() { guest qmp query-balloon | grep -q "\"actual\": $1}"; }
# What the backend logs when memory is discarded while the device uses it.
# shellcheck disable=SC2034 # used by the scripts that source this
ALARM='ERROR.*guest memory is being discarded under the device'

# stress_start SECONDS [OPTION of stress]…: starts a load of all kinds and sizes of requests, 128 in flight, each checked, in the
# background of a guest that was started with --add stress; returns when some have completed.
# stress_stop: ends it early. stress_result: waits for its end and returns its result.
stress_start() {
    guest exec -- "rm -f /tmp/stress.log /tmp/stressed /tmp/enough
        (stress /dev/vda --until /tmp/enough --seconds $* >/tmp/stress.log 2>&1; echo \$? >/tmp/stressed) >/dev/null 2>&1 &
        until grep -qs '^ended=[1-9]' /tmp/stress.log; do [ ! -e /tmp/stressed ] || { cat /tmp/stress.log; exit 1; }; sleep 0.2; done"
}
stress_stop() { guest exec -- '[ ! -e /tmp/stressed ] && : >/tmp/enough'; }
stress_result() {
    guest exec --timeout 600 -- 'while [ ! -e /tmp/stressed ]; do sleep 0.5; done
        tail -n 1 /tmp/stress.log; [ "$(cat /tmp/stressed)" = 0 ]'
}
# stress_lines: lines in its log. longest_gap LINE: the longest time without a completed request after that line, in ms.
stress_lines() { guest exec -- 'wc -l </tmp/stress.log'; }
longest_gap() {
    guest exec -- "awk -F = 'NR > $1 && /gap_ms/ && \$3 > most { most = \$3 } END { print most + 0 }' /tmp/stress.log"
}

# record_resources: stores the pins and descriptors that the backend holds.
# killed_under_stress: kills a virtual machine with requests in flight; the backend then holds what was recorded, and nothing
# more. Adds a line to /run/killed.
record_resources() {
    pinned >/run/pinned-before
    descriptors >/run/descriptors-before
}
killed_under_stress() {
    stress_start 600 "$@"
    before=$(times_logged 'front-end disconnected' || true)
    guest kill
    within 15 logged_more_than "$before" 'front-end disconnected'
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-before)" "$(descriptors)" "descriptors"
    echo 0 >/proc/sys/vm/nr_hugepages
    echo >>/run/killed
}

# stress_combination RING PAGES BLOCK: split or packed, 4K or 2M, bytes. Every kind of request occurs and verifies; then the
# virtual machine is killed under load.
stress_combination() {
    packed='' huge=''
    guest kill 2>/dev/null || true # left by a claim that failed
    [ "$1" = split ] || packed='--blk packed=on'
    [ "$2" = 4K ] || huge=--hugepages
    # shellcheck disable=SC2086 # split into words
    guest_start --queues 2 --smp 2 --mem 160M --add stress $packed $huge
    equal "pages $2" "$(grep 'region .* mapped in' "$BACKEND_LOG" | tail -n 1 | grep -o 'pages [0-9]*[KM]')" "what is mapped"
    equal "$3" "$(guest exec -- 'cat /sys/block/vda/queue/logical_block_size')" "bytes in a block"
    stress_start 10 --block "$3" --discard --seed "$(wc -l </run/killed)1"
    # Not through a pipe, which would return the status of its last command.
    stress_result >/run/sums || { cat /run/sums && return 1; }
    cat /run/sums
    grep -qE '^reads=[1-9].* writes=[1-9].* zeroes=[1-9].* discards=[1-9].* flushes=[1-9].* wrong=0$' /run/sums
    killed_under_stress --block "$3" --discard
}

# own_memory BUFFERS: memory of the backend itself, kB: anonymous memory, program text, and BUFFERS kB of buffers for the drive,
# whether they have been touched or not.
own_memory() {
    awk -v "sum=$1" '/^Rss(Anon|File):/ { sum += $2 } END { print sum }' "/proc/$(cat "$BACKEND_PID")/status"
}
small_with_four_queues() {
    guest kill 2>/dev/null || true # left by a claim that failed
    backend_stop 2>/dev/null || true
    backend_start --queues 4
    buffers=$(pinned)
    guest_start --queues 4 --smp 4 --mem 160M --hugepages --blk queue-size=256 --add stress
    stress_start 4
    stress_result
    own_memory "$buffers" >/run/own
    guest stop
    backend_stop
    [ "$(cat /run/own)" -le 24576 ]
}

# stress_progresses: more requests complete.
stress_progresses() {
    guest exec -- 'grep -c ^ended= /tmp/stress.log' >/run/lines
    within 30 guest exec -- "awk -F '[= ]' '/^ended=/ { n++; if (n == $(cat /run/lines)) then = \$2; last = \$2 }
        END { exit !(last > then) }' /tmp/stress.log"
}

# pages_pinned: pages pinned for DMA in the whole machine. Writing stat_refresh adds the counts that processors have not yet
# reported.
pages_pinned() {
    echo 1 >/proc/sys/vm/stat_refresh
    awk '$1 == "nr_foll_pin_acquired" { n += $2 } $1 == "nr_foll_pin_released" { n -= $2 } END { print n }' /proc/vmstat
}

# serve_whole NAME FUNCTION [ARGUMENT…]: starts a backend that serves the whole FUNCTION on /run/NAME.sock; returns when it
# listens. use_process NAME: BACKEND_LOG and the other variables now refer to that process.
use_process() {
    SOCKET=/run/$1.sock BACKEND_LOG=/run/$1.log BACKEND_PID=/run/$1.pid BACKEND_STATUS=/run/$1.status
}
serve_whole() {
    use_process "$1"
    served=$2
    shift 2
    rm -f "$BACKEND_STATUS"
    : >"$BACKEND_LOG"
    (
        status=0
        sh -c "echo \$\$ >$BACKEND_PID; exec \"\$@\"" - \
            vhost-device-vfio --vfio-user --socket-path "$SOCKET" --device "$served" "$@" || status=$?
        echo $status >"$BACKEND_STATUS"
    ) </dev/null >>"$BACKEND_LOG" 2>&1 &
    within 20 logged 'serving ' || {
        show_backend
        return 1
    }
}
# vfio_user_device NAME [PROPERTY…]: the argument of QEMU's -device for it, as JSON.
vfio_user_device() {
    name=$1
    shift
    printf '{"driver":"vfio-user-pci","id":"%s","socket":{"type":"unix","path":"/run/%s.sock"}' "$name" "$name"
    for property; do printf ',%s' "$property"; done
    printf '}'
}
# ledger: kB that are mapped according to the backend's log. context_switches: how often the backend has been scheduled.
ledger() { sed -n 's/.*; \([0-9]*\) KiB \(mapped\|in all\|left\)$/\1/p' "$BACKEND_LOG" | tail -n 1; }
context_switches() { awk '/ctxt_switches/ { n += $2 } END { print n }' "/proc/$(cat "$BACKEND_PID")/status"; }

HANDOVER=/run/handover.sock

# successor_start NAME [ARGUMENT…]: starts a process that takes over. Its files are named NAME. AS may be a command that
# starts it as another user.
successor_start() {
    name=$1
    shift
    rm -f "/run/$name.status"
    : >"/run/$name.log"
    (
        status=0
        ${AS:-} sh -c "echo \$\$ >/run/$name.pid; exec \"\$@\"" - vhost-device-vfio --socket-path "$SOCKET" \
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

# hand_over NAME [ARGUMENT…]: the backend hands over to a new process, and ends well; guest memory stays pinned.
hand_over() {
    before=$(pages_pinned) released=$(pages_released)
    successor_start "$@"
    within 30 grep -q 'taken over; requests waited' "/run/$1.log" || {
        cat "/run/$1.log"
        waits "$(cat "/run/$1.pid")"
        show_backend
        return 1
    }
    within 20 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status of the predecessor"
    logged 'handed over to process'
    equal 0 "$(times_logged 'front-end disconnected|region .* unmapped')" "disconnects and unmaps in the predecessor"
    became "$1"
    sed -n 's/.*taken over; requests/# taken over; requests/p' "$BACKEND_LOG"
    released=$(($(pages_released) - released))
    echo "# pages released: $released; pinned: $before before, $(pages_pinned) after"
    # The buffers of the two processes change, 2 MiB for each queue. The guest has 40960 pages.
    [ "$released" -lt 4096 ]
    [ "$(pages_pinned)" -gt $((before - 4096)) ]
}

# stopped_while_taking_over SIGNAL REASON [ARGUMENT…]: a successor is stopped (STOP) or killed (KILL) while it starts the
# controller, which can then be in any state. The backend goes on, and logs REASON.
stopped_while_taking_over() {
    signal=$1 reason=$2
    shift 2
    for n in 1 2 3 4 5; do
        successor_start "stopped-$signal-$n" "$@"
        until grep -q 'taken over with its address space' "/run/$name.log" || [ -s "/run/$name.status" ]; do :; done
        kill -STOP "$(cat "/run/$name.pid")"
        sleep 0.5
        [ -s "$BACKEND_STATUS" ] || break
        # Too late: it has taken over.
        kill -CONT "$(cat "/run/$name.pid")"
        became "$name"
    done
    kill "-$signal" "$(cat "/run/$name.pid")"
    within 30 test -s "/run/$name.status"
    grep 'taken over; requests waited' "/run/$name.log" && return 1
    within 30 logged "not handed over to process .*$reason.*; going on"
}

# requests_recovered: adds the requests that the running backend has submitted again to /run/recovered.
requests_recovered() {
    sed -n 's/.*: \([0-9]*\) requests of the process before are submitted again$/\1/p' "$BACKEND_LOG" >>/run/recovered
}
