# shellcheck shell=sh
# For tests that run inside the emulated host: the backend's life, its pins, a guest with its disk.
# Sourced by tests/host/*.sh, which lie in /testbed/tests there.

# shellcheck source=tests/testbed/claims.sh
. /testbed/claims.sh

SOCKET=/run/backend.sock
BACKEND_LOG=/run/backend.log
BACKEND_PID=/run/backend.pid
BACKEND_STATUS=/run/backend.status

# backend_start [ARGUMENT…]: serves $FUNCTION on $SOCKET; returns when the drive is up.
backend_start() {
    rm -f "$BACKEND_STATUS"
    # Here, not by the process below: until that runs, the log of the process before would answer for it.
    : >"$BACKEND_LOG"
    (
        status=0
        sh -c "echo \$\$ >$BACKEND_PID; exec \"\$@\"" - \
            vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" "$@" || status=$?
        echo $status >"$BACKEND_STATUS"
    ) </dev/null >"$BACKEND_LOG" 2>&1 &
    # Controller reset included, and the processors are emulated.
    within 20 logged 'serving ' || {
        cat "$BACKEND_LOG"
        return 1
    }
}

# backend_stop: asks it to end, and gives its exit status.
backend_stop() {
    kill -TERM "$(cat "$BACKEND_PID")"
    within 20 test -s "$BACKEND_STATUS"
    return "$(cat "$BACKEND_STATUS")"
}

# pinned: kB of memory the backend has pinned for DMA.
pinned() { awk '/^VmPin:/ { print $2 }' "/proc/$(cat "$BACKEND_PID")/status"; }

nothing_pinned() { equal 0 "$(pinned)" "kB pinned by the backend"; }

# statistic NAME: a counter from the line the backend logs when it ends.
statistic() { sed -n "s/.*statistics: .*\\b$1=\\([0-9]*\\).*/\\1/p" "$BACKEND_LOG" | tail -n 1; }

# guest_start [OPTION of "guest start"]…: a guest with the backend's disk as /dev/vda.
# The host's processors are emulated, and its machine may be busy.
guest_start() { guest start --socket "$SOCKET" --timeout 300 "$@"; }

# descriptors, cpu_ticks: what else the backend holds and uses.
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

# A workload that checks every byte it reads back: any size from a sector to a megabyte, many at once, flushes between.
VERIFY='fio --name=verify --filename=/dev/vda --direct=1 --rw=randrw --bsrange=512-1M --blockalign=512 --size=48M
--iodepth=32 --fsync=50 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --randrepeat=0 --output=/tmp/fio.log'

# verifying: runs it in the guest, and shows what it says if it finds a wrong byte.
verifying() { guest exec --timeout 400 -- "$(echo "$VERIFY" | tr '\n' ' ') $* || { cat /tmp/fio.log; exit 1; }"; }

# verifying_meanwhile [OPTION…], verified_meanwhile: the same in the background, and its outcome.
verifying_meanwhile() {
    guest exec -- "rm -f /tmp/verified; ($(echo "$VERIFY" | tr '\n' ' ') $* >/dev/null 2>&1; echo \$? >/tmp/verified) >/dev/null 2>&1 &"
}
verified_meanwhile() {
    guest exec --timeout 400 -- 'while [ ! -e /tmp/verified ]; do sleep 1; done
        [ "$(cat /tmp/verified)" = 0 ] || { cat /tmp/fio.log; exit 1; }'
}

# probe FUNCTION…, hits FUNCTION: how often the kernel has entered its functions since. mark, hits_since_mark FUNCTION.
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

# bind_to_vfio FUNCTION: takes it from the driver it has.
bind_to_vfio() {
    echo vfio-pci >"/sys/bus/pci/devices/$1/driver_override"
    [ ! -e "/sys/bus/pci/devices/$1/driver" ] || echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"
    echo "$1" >/sys/bus/pci/drivers_probe
}

# bind_to_nvme FUNCTION: to the kernel's own driver; returns when its drive is there. block_device FUNCTION: the drive's path.
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
        [ -b "/dev/${at##*/}" ] && echo "/dev/${at##*/}"
    done
}

# inflate BYTES: the guest keeps so many, and its balloon, a device of QEMU's, takes the rest.
inflate() {
    guest qmp balloon "{\"value\":$1}"
    within 60 inflated "$1"
}
inflated() { guest qmp query-balloon | grep -q "\"actual\": $1}"; }
# What the backend says of memory that is taken under the device.
# shellcheck disable=SC2034 # for those who source this
ALARM='ERROR.*guest memory is being discarded under the device'

# stressing SECONDS [OPTION of stress]…: requests of every kind and size, 128 at once, each checked, in the background of a
# guest started with --add stress; it returns when some have ended. stress_enough: no more of them, though the time is not
# over. stressed: their outcome.
stressing() {
    guest exec -- "rm -f /tmp/stress.log /tmp/stressed /tmp/enough
        (stress /dev/vda --until /tmp/enough --seconds $* >/tmp/stress.log 2>&1; echo \$? >/tmp/stressed) >/dev/null 2>&1 &
        until grep -qs '^ended=[1-9]' /tmp/stress.log; do [ ! -e /tmp/stressed ] || { cat /tmp/stress.log; exit 1; }; sleep 0.2; done"
}
stress_enough() { guest exec -- '[ ! -e /tmp/stressed ] && : >/tmp/enough'; }
stressed() {
    guest exec --timeout 600 -- 'while [ ! -e /tmp/stressed ]; do sleep 0.5; done
        tail -n 1 /tmp/stress.log; [ "$(cat /tmp/stressed)" = 0 ]'
}
# stress_lines, longest_gap LINE: the longest time without a request that ended, in ms, since its log had so many lines.
stress_lines() { guest exec -- 'wc -l </tmp/stress.log'; }
longest_gap() {
    guest exec -- "awk -F = 'NR > $1 && /gap_ms/ && \$3 > most { most = \$3 } END { print most + 0 }' /tmp/stress.log"
}

# killed_under_stress: nothing of a virtual machine stays that is killed with requests in flight, as against
# remember_what_is_held. Each leaves a line in /run/killed.
remember_what_is_held() {
    pinned >/run/pinned-before
    descriptors >/run/descriptors-before
}
killed_under_stress() {
    stressing 600 "$@"
    before=$(times_logged 'front-end disconnected' || true)
    guest kill
    within 15 logged_more_than "$before" 'front-end disconnected'
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-before)" "$(descriptors)" "descriptors"
    echo 0 >/proc/sys/vm/nr_hugepages
    echo >>/run/killed
}

# stress_combination RING PAGES BLOCK: split or packed, 4K or 2M, bytes. Every kind of request occurs and verifies, then the
# machine is killed under load.
stress_combination() {
    packed='' huge=''
    guest kill 2>/dev/null || true # one that has failed
    [ "$1" = split ] || packed='--blk packed=on'
    [ "$2" = 4K ] || huge=--hugepages
    # shellcheck disable=SC2086 # words
    guest_start --queues 2 --smp 2 --mem 160M --add stress $packed $huge
    equal "pages $2" "$(grep 'region .* mapped in' "$BACKEND_LOG" | tail -n 1 | grep -o 'pages [0-9]*[KM]')" "what is mapped"
    equal "$3" "$(guest exec -- 'cat /sys/block/vda/queue/logical_block_size')" "bytes in a block"
    stressing 10 --block "$3" --discard --seed "$(wc -l </run/killed)1"
    # Not through a pipe, which would end with the status of its last command.
    stressed >/run/sums || { cat /run/sums && return 1; }
    cat /run/sums
    grep -qE '^reads=[1-9].* writes=[1-9].* zeroes=[1-9].* discards=[1-9].* flushes=[1-9].* wrong=0$' /run/sums
    killed_under_stress --block "$3" --discard
}

# memory_of_its_own: anonymous memory and program text, kB, and all buffers for the drive, whether they have been touched or
# not, which the argument says.
memory_of_its_own() {
    awk -v "sum=$1" '/^Rss(Anon|File):/ { sum += $2 } END { print sum }' "/proc/$(cat "$BACKEND_PID")/status"
}
small_with_four_queues() {
    guest kill 2>/dev/null || true # one that has failed
    backend_stop 2>/dev/null || true
    backend_start --queues 4
    buffers=$(pinned)
    guest_start --queues 4 --smp 4 --mem 160M --hugepages --blk queue-size=256 --add stress
    stressing 4
    stressed
    memory_of_its_own "$buffers" >/run/own
    guest stop
    backend_stop
    [ "$(cat /run/own)" -le 24576 ]
}

# stress_goes_on: requests end that were not yet ended.
stress_goes_on() {
    guest exec -- 'grep -c ^ended= /tmp/stress.log' >/run/lines
    within 30 guest exec -- "awk -F '[= ]' '/^ended=/ { n++; if (n == $(cat /run/lines)) then = \$2; last = \$2 }
        END { exit !(last > then) }' /tmp/stress.log"
}

# pages_pinned: by anybody in this machine, for DMA; each processor is asked for what it has not yet reported.
pages_pinned() {
    echo 1 >/proc/sys/vm/stat_refresh
    awk '$1 == "nr_foll_pin_acquired" { n += $2 } $1 == "nr_foll_pin_released" { n -= $2 } END { print n }' /proc/vmstat
}

# whole NAME FUNCTION [ARGUMENT…]: a process of its own serves the whole FUNCTION on /run/NAME.sock; returns when it listens.
# whole_as NAME: from here on BACKEND_LOG and the like are those of that process.
whole_as() {
    SOCKET=/run/$1.sock BACKEND_LOG=/run/$1.log BACKEND_PID=/run/$1.pid BACKEND_STATUS=/run/$1.status
}
whole() {
    whole_as "$1"
    served=$2
    shift 2
    rm -f "$BACKEND_STATUS"
    : >"$BACKEND_LOG"
    (
        status=0
        sh -c "echo \$\$ >$BACKEND_PID; exec \"\$@\"" - \
            vhost-device-vfio --vfio-user --socket-path "$SOCKET" --device "$served" "$@" || status=$?
        echo $status >"$BACKEND_STATUS"
    ) </dev/null >"$BACKEND_LOG" 2>&1 &
    within 20 logged 'serving ' || {
        cat "$BACKEND_LOG"
        return 1
    }
}
# whole_device NAME [PROPERTY…]: what QEMU calls it, as JSON.
whole_device() {
    name=$1
    shift
    printf '{"driver":"vfio-user-pci","id":"%s","socket":{"type":"unix","path":"/run/%s.sock"}' "$name" "$name"
    for property; do printf ',%s' "$property"; done
    printf '}'
}
# ledger: kB that the process says it has mapped. ran: how often it has been given a processor.
ledger() { sed -n 's/.*; \([0-9]*\) KiB \(mapped\|in all\|left\)$/\1/p' "$BACKEND_LOG" | tail -n 1; }
ran() { awk '/ctxt_switches/ { n += $2 } END { print n }' "/proc/$(cat "$BACKEND_PID")/status"; }
