#!/bin/sh
# profiles: vtd vtd-snoop
# minutes: 0.4
# boot: plain
# The device, the iommufd and the sockets are opened elsewhere and passed in. The program runs as nobody, without any capability,
# and sees no file but itself and its libraries: no /dev, no /sys, no /proc.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

ROOT=/run/empty
CDEV=/dev/vfio/devices/$(ls "/sys/bus/pci/devices/$FUNCTION/vfio-dev")
CONTROL=/run/control.sock

# root_with_program: a file system at $ROOT with the program, and nothing else.
root_with_program() {
    mkdir -p $ROOT && mount -t tmpfs empty $ROOT
    program=$(command -v vhost-device-vfio)
    LD_TRACE_LOADED_OBJECTS=1 /lib64/ld-linux-x86-64.so.2 "$program" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$ROOT$(dirname "$library")" && cp -L "$library" "$ROOT$library"
    done
    mkdir -p $ROOT/lib64 && cp -L /lib64/ld-linux-x86-64.so.2 $ROOT/lib64/
    cp "$program" $ROOT/program
}

# start_unprivileged PASSED… -- ARGUMENT…: as backend_start, in that file system.
start_unprivileged() {
    passed=''
    while [ "$1" != -- ]; do passed="$passed $1" && shift; done
    shift
    rm -f "$BACKEND_STATUS" "$SOCKET" "$CONTROL"
    : >"$BACKEND_LOG"
    (
        status=0
        # shellcheck disable=SC3045 # busybox has it
        ulimit -l unlimited
        # shellcheck disable=SC2086 # several words
        unshare -m sh -c "echo \$\$ >$BACKEND_PID; exec \"\$@\"" - \
            unprivileged $ROOT $passed -- /program "$@" || status=$?
        echo "$status" >"$BACKEND_STATUS"
    ) </dev/null >>"$BACKEND_LOG" 2>&1 &
    within 20 logged 'serving ' || {
        cat "$BACKEND_LOG"
        return 1
    }
}
# end_left: ends the backend that a failed claim has left.
end_left() {
    [ -s "$BACKEND_PID" ] || return 0
    kill -KILL "$(cat "$BACKEND_PID")" 2>/dev/null || true
    within 5 ended
}
ended() { [ ! -e "/proc/$(cat "$BACKEND_PID")" ]; }
everything() {
    end_left
    start_unprivileged "device=$CDEV" iommu=/dev/iommu "socket=listen:$SOCKET" "control=listen:$CONTROL" -- --device fd "$@"
}

rights_of_backend() {
    status=/proc/$(cat "$BACKEND_PID")/status
    equal "65534 65534 65534 65534" "$(awk '/^Uid:/ { print $2, $3, $4, $5 }' "$status")" users
    equal 0000000000000000 "$(awk '/^CapEff:/ { print $2 }' "$status")" "effective capabilities"
    equal 0000000000000000 "$(awk '/^CapPrm:/ { print $2 }' "$status")" "permitted capabilities"
    seen=$(ls "/proc/$(cat "$BACKEND_PID")/root/")
    equal "" "$(echo "$seen" | grep -E '^(dev|sys|proc|run|etc)$')" "directories that it sees"
}
serves_verified() {
    rm -f /run/orders && mkfifo /run/orders
    front-end "$SOCKET" </run/orders >/run/answers 2>&1 &
    exec 4>/run/orders
    echo 2000 >&4
    within 60 grep -q progressed /run/answers || { cat /run/answers "$BACKEND_LOG" && return 1; }
    echo end >&4
    exec 4>&-
    within 60 grep -q 'nothing lost, doubled or reordered' /run/answers || {
        cat /run/answers "$BACKEND_LOG"
        return 1
    }
}
# The oracle's disk is empty at first: its first 4 MiB.
empty_drive() {
    bind_to_nvme "$FUNCTION"
    dd if=/dev/zero of="$(block_device "$FUNCTION")" bs=1M count=8 conv=fsync 2>/dev/null
    bind_to_vfio "$FUNCTION"
}

served_as_nobody() {
    everything --queues 2 --sandbox strict
    rights_of_backend
    logged 'DMA is coherent'
    serves_verified
    vhost-device-vfio ctl --socket "$CONTROL" --json status >/run/ctl-status
    grep -q '"coherent"' /run/ctl-status || cat /run/ctl-status
}
held_by_nobody_else() {
    backend_stop || { tail -n 3 "$BACKEND_LOG" && return 1; }
    within 5 nothing_at_all_pinned
}
nothing_at_all_pinned() { equal "$(cat /run/pins)" "$(pages_pinned)" "pages pinned in this machine"; }

# Without procfs and sysfs nothing says whether it is a virtual function, except that it has an interrupt pin.
by_number() {
    end_left
    start_unprivileged "other=$CDEV" "other=/dev/iommu" "socket=listen:$SOCKET" -- --device fd=3 --iommu-fd 4 --fd 5 --queues 1
    rights_of_backend
    load "$SOCKET" --requests 200 || { cat "$BACKEND_LOG" && return 1; }
    backend_stop
}
iommu_missing() {
    start_unprivileged "device=$CDEV" "socket=listen:$SOCKET" -- --device fd >/run/answer && return 1
    grep -q 'no open /dev/iommu was passed in (--iommu-fd, or OpenFile=/dev/iommu:iommu), and it cannot be opened' /run/answer
}
no_device() {
    start_unprivileged device=/dev/iommu iommu=/dev/iommu "socket=listen:$SOCKET" -- --device fd >/run/answer && return 1
    grep -q 'it is no VFIO device; pass an open /dev/vfio/devices/vfioN' /run/answer
}
bound_by_another() {
    end_left
    backend_start
    used=$(cat "$BACKEND_PID")
    cp "$BACKEND_LOG" /run/first.log
    start_unprivileged "device=$CDEV" iommu=/dev/iommu "socket=listen:/run/second.sock" -- --device fd >/run/answer && return 1
    grep -q 'another process uses it' /run/answer
    echo "$used" >"$BACKEND_PID"
    kill -TERM "$used"
    within 20 ended
}

# A drive that goes away is released. It cannot be opened by its path when it is back, and the log says what to do.
gone_and_back() {
    everything --queues 1
    load "$SOCKET" --requests 200
    timeout 15 sh -c "echo $FUNCTION >/sys/bus/pci/devices/$FUNCTION/driver/unbind"
    bind_to_vfio "$FUNCTION"
    within 20 logged 'its file was passed in, so this process cannot open it again; .* start this program again with a new file'
    equal 0 "$(pinned)" "kB pinned while the drive is away"
    backend_stop
}

root_with_program || exit
empty_drive || exit
pages_pinned >/run/pins
claim "a drive that was passed in is served by nobody, who sees no file, and a verifying load finds no error" served_as_nobody
claim "when it ends, nothing stays pinned" held_by_nobody_else
claim "device, iommufd and socket can be passed by their numbers" by_number
claim "without an iommufd the error says how to pass one" iommu_missing
claim "a file that is no device is refused" no_device
claim "a device that another process uses is refused" bound_by_another
claim "a passed-in drive that the host takes back is released, and the log says what to do" gone_and_back
umount $ROOT
finished
