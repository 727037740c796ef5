# shellcheck shell=sh
# For the tests in the emulated arm64 host, after tests/host/lib.sh.

# killed_before: a claim that failed may have left a backend.
killed_before() {
    [ ! -s "$BACKEND_PID" ] || kill -KILL "$(cat "$BACKEND_PID")" 2>/dev/null || true
    within 10 test ! -d "/proc/$(cat "$BACKEND_PID" 2>/dev/null || echo none)"
}

# answers_are ANSWER…: claims about what the kernel says to a program that shares no code with the backend.
answers_are() {
    iommu-probe "$FUNCTION" >/run/answers || exit
    sed 's/^/# /' /run/answers
    for answer; do claim "the kernel answers $answer" contains "$answer" /run/answers; done
}

# verdicts: the rows of the table for a function that never sets No Snoop, behind an IOMMU that does not enforce snooping.
verdict() {
    killed_before
    backend_start --no-snoop "$1"
    logged "DMA is $2\$"
    backend_stop
}
verdicts() {
    vhost-device-vfio inspect "$FUNCTION" >/run/inspected
    claim "the report says that snooping is not enforced" contains 'snoop-enforced  no' /run/inspected
    for policy in suppress allow refuse; do
        claim "--no-snoop $policy: coherent, because the device never sets No Snoop" \
            verdict "$policy" 'coherent: the device never sets No Snoop'
    done
    claim "--no-snoop assume: flushed around each request" \
        verdict assume 'not coherent: flushed at map, at unmap and around each request; KVM is not told'
}

# oracle POLICY [OPTION…]: a front-end whose oracle knows each block, of an empty drive. It reads the whole drive at the end.
oracle() {
    policy=$1
    shift
    killed_before
    backend_start --queues 2 --no-snoop "$policy"
    before=$(pinned)
    { echo 3000 && sleep 1 && echo end; } | timeout 200 front-end "$SOCKET" "$@" >/run/oracle || {
        cat /run/oracle "$BACKEND_LOG"
        return 1
    }
    contains 'nothing lost, doubled or reordered' /run/oracle
    within 10 logged 'unmapped'
    equal "$before" "$(pinned)" "kB pinned once the front-end has gone"
    backend_stop
}
nothing_flushed() {
    FUNCTION=$1
    oracle suppress
    for name in flushed_bytes map_flushed_bytes unmap_flushed_bytes staged; do equal 0 "$(statistic "$name")" "$name"; done
}

# flushed_and_staged: through iommufd, on the second drive, which is empty still.
flushed_and_staged() {
    FUNCTION=0000:00:05.0
    oracle assume --packed
    for name in staged flushed_bytes map_flushed_bytes unmap_flushed_bytes; do [ "$(statistic "$name")" -gt 0 ]; done
}

# live_tests PATTERN [REGIME]: those of backend/tests/live.rs.
live_tests() {
    killed_before
    # A predecessor and a successor are processes that the tests of a hand-over start.
    live --list 2>/dev/null | sed -n '/::\(predecessor\|successor\):/d; s/: test$//p' | grep -E "$1" >/run/names
    claim "there are tests of $1" test -s /run/names
    while read -r name; do
        claim "$(echo "$name" | sed 's/::/: /' | tr _ ' ')${2:+, $2}" \
            env VDV_DEVICE="$FUNCTION" VDV_REGIME="${2:-}" live --exact "$name"
    done </run/names
}

# unit_tests FILTER: those of the backend.
unit_tests() {
    unit-tests "$1" >/run/unit-tests 2>&1 || {
        cat /run/unit-tests
        return 1
    }
    lacks 'test result: ok. 0 passed' /run/unit-tests
}
