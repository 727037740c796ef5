#!/bin/sh
# profiles: vtd vtd-snoop amd-iommu debian
# minutes: 0.6
# boot: iommu
# The next front-end of a virtual machine waits while the first is served, and takes its place: the kernel replaces the page table of
# the drive, and nothing is mapped between the stop of the first and the start of the next. If both have the same memory, the page
# table stays. Under type1 (debian) it is sent away. The
# front-ends are a program of the tests, which has the oracle's load; tests/outside/changed.sh has stock QEMU.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

ORDERS=/run/orders ANSWERS=/run/answers-of-front-end

# front_end_start [OPTION]…: a front-end under load, which is told what to do. tell ORDER ANSWER: tells it, and waits for the answer.
front_end_start() {
    rm -f "$ORDERS" && mkfifo "$ORDERS" && : >"$ANSWERS"
    (exec front-end "$SOCKET" "$@") <"$ORDERS" >"$ANSWERS" 2>&1 &
    echo $! >/run/front-end.pid
    # It stays open in all that is started from here on.
    exec 7>"$ORDERS"
}
tell() {
    lines=$(wc -l <"$ANSWERS")
    echo "$1" >&7
    within 60 answered "$lines"
    contains "$2" "$ANSWERS"
    lacks error "$ANSWERS"
}
answered() { [ "$(wc -l <"$ANSWERS")" -gt "$1" ]; }
front_end_ends() {
    tell end 'nothing lost, doubled or reordered'
    exec 7>&-
    within 20 logged 'front-end disconnected: .*: it has left'
}
# replaced: since the mark the page table has been replaced once, and before that nothing was mapped or unmapped.
replaced() {
    equal 1 "$(hits_since_mark iommufd_device_replace)" "page tables replaced"
    equal 0 "$(hits_since_mark iommufd_device_detach)" "detaches"
    sed -n 's/.* \(iommufd_[a-z_]*\): .*/\1/p' "$TRACING/trace" >/run/traced
    equal iommufd_device_replace "$(head -n 1 /run/traced)" "first of: $(tr '\n' ' ' </run/traced)"
}

# nothing_done: since the mark nothing was replaced, mapped or unmapped.
nothing_done() {
    for entry in iommufd_device_replace iommufd_device_detach iommufd_ioas_map_file iommufd_ioas_copy; do
        equal 0 "$(hits_since_mark "$entry")" "$entry"
    done
}

# A disk must be empty when the load starts.
empty() { dd if=/dev/zero of="$(block_device "$FUNCTION")" bs=1M count=64 conv=fsync 2>/dev/null; }
fresh() {
    bind_to_nvme "$FUNCTION" && empty && bind_to_vfio "$FUNCTION"
}
changes_early() {
    tell "next $1 early" waiting
    logged 'front-end waits for its turn'
    tell 200 progressed
    before=$(times_logged 'has its turn' || true)
    mark
    echo >"$TRACING/trace"
    tell change changed
    if [ "$1" = same ]; then nothing_done; else replaced; fi
    equal $((before + 1)) "$(times_logged 'has its turn: moved to its memory')" "turns"
    tell 200 progressed
    pinned_as_before
}
changes_late() {
    tell "next copied late" waiting
    mark
    tell change changed
    equal 1 "$(hits_since_mark iommufd_device_replace)" "page tables replaced"
    tell 200 progressed
    pinned_as_before
}
leaves() {
    mark
    tell 'next copied early' waiting
    tell leave left
    within 20 logged 'it has not had its turn; memory unmapped'
    tell 200 progressed
    equal 0 "$(hits_since_mark iommufd_device_replace)" "page tables replaced"
    pinned_as_before
}
pinned_as_before() { within 20 same_pins; }
same_pins() { equal "$(cat /run/pins)" "$(pinned)" "kB pinned"; }
remember_pins() { pinned >/run/pins; }

served() {
    fresh
    backend_start --queues 2 --successor "$@"
    rm -f /run/pins
    front_end_start
    tell 200 progressed && remember_pins
}
ends_well() {
    front_end_ends
    backend_stop
    equal 0 "$(statistic errors)" "requests failed"
    lacks ' ERROR ' "$BACKEND_LOG"
}
downtimes() { sed -n 's/.*\(has its turn.*\|downtime .*\)/# \1/p' "$BACKEND_LOG"; }

sent_away() {
    tell 'next copied early' '' 2>/dev/null || true
    within 20 logged 'was to wait for its turn: no second address space .*: VFIO type1 has one page table'
}

if [ ! -e /dev/iommu ]; then
    backend_start --queues 2 --successor || exit
    front_end_start
    claim "under type1 the next front-end is sent away, and the log says why" sent_away
    backend_stop
    finished
    exit
fi
probe iommufd_device_replace iommufd_device_detach iommufd_ioas_map_file iommufd_ioas_copy iommufd_ioas_unmap
for verdict in suppress assume; do
    served --no-snoop "$verdict" || { cat "$BACKEND_LOG" "$ANSWERS"; exit 1; }
    claim "the next front-end goes on, its memory was mapped before; verdict $verdict" changes_early copied
    claim "one that has the same memory goes on, and the page table stays; verdict $verdict" changes_early same
    claim "one that shares its memory late goes on; verdict $verdict" changes_late
    claim "one that leaves before its turn changes nothing; verdict $verdict" leaves
    downtimes
    claim "nothing was lost, doubled or reordered; verdict $verdict" ends_well
done
finished
