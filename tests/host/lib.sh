# shellcheck shell=sh
# For tests that run inside the emulated host: the backend's life, its pins, a guest with its disk.
# Sourced by tests/host/*.sh, which lie in /testbed/tests there.

# shellcheck source=tests/testbed/claims.sh
. /testbed/claims.sh

SOCKET=/run/backend.sock
BACKEND_LOG=/run/backend.log
BACKEND_PID=/run/backend.pid
BACKEND_STATUS=/run/backend.status

# backend_start [ARGUMENT…]: serves $FUNCTION on $SOCKET; returns when the socket is there.
backend_start() {
    rm -f "$BACKEND_STATUS"
    (
        sh -c "echo \$\$ >$BACKEND_PID; exec \"\$@\"" - \
            vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" "$@"
        echo $? >"$BACKEND_STATUS"
    ) </dev/null >"$BACKEND_LOG" 2>&1 &
    # Controller reset included, and the processors are emulated.
    within 20 test -S "$SOCKET" || {
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
guest_start() { guest start --socket "$SOCKET" "$@"; }
