#!/usr/bin/env bash
# minutes: 0.4
# The unit files under the real systemd, on this machine: a front-end under the oracle's load must not notice a restart, a crash
# or an update. Needs root, because systemd is process 1 of namespaces of its own.
# Whether this machine runs systemd does not matter. Only the device is changed, to an emulated drive.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

INSTANCE=0000:00:04.0
UNIT=vhost-device-vfio@$INSTANCE.service SOCKET_UNIT=vhost-device-vfio@$INSTANCE.socket
WORK=$(mktemp -d)
ORDERS=$WORK/orders ANSWERS=$WORK/answers

clean_up() {
    local file
    for file in "$WORK"/front-end.pid "$WORK"/pid; do
        [[ ! -s $file ]] || kill -9 "$(<"$file")" 2>/dev/null
    done
    # It removes its control groups.
    wait
    rm -rf "$WORK"
}
trap clean_up EXIT

inside() { nsenter --target "$(<"$WORK/pid")" --mount --pid -- "$@"; }
property() { inside systemctl show --property "$1" --value "${2:-$UNIT}"; }
is() { [[ $(property "$1") == "$2" ]]; }
# installed PROGRAM: replaces the program as a package manager does.
installed() {
    inside sh -c 'cd /usr/local/bin && cat >new && chmod 755 new && mv new vhost-device-vfio' <"$1"
}

systemd_starts() {
    within 20 test -s "$WORK/pid"
    within 20 inside systemctl start "$SOCKET_UNIT"
    is ActiveState inactive
}
no_fault() {
    inside systemd-analyze verify --man=no /run/units/vhost-device-vfio@.{service,socket} >"$WORK/verified" 2>&1 ||
        cat "$WORK/verified"
    equal '' "$(cat "$WORK/verified")" "remarks of systemd-analyze verify"
}
# What systemd-analyze makes of the unit's restrictions: 0 is nothing exposed, 10 everything.
exposed_little() {
    cp "scripts/systemd/vhost-device-vfio@.service" "$WORK/$UNIT"
    systemd-analyze security --offline=yes --threshold=20 --no-pager "$WORK/$UNIT" >"$WORK/exposure" ||
        { cat "$WORK/exposure" && return 1; }
}

# connects LAYOUT: a new front-end with an empty disk.
connects() {
    rm -f "$WORK/run/vhost-device-vfio/disk"
    "$TARGET/debug/front-end" "$WORK/run/vhost-device-vfio/$INSTANCE.sock" "$@" <"$ORDERS" >"$ANSWERS" 2>&1 &
    echo $! >"$WORK/front-end.pid"
    progresses
    is ActiveState active
    within 5 eval '(($(property NFileDescriptorStore) > 5))'
}
order() {
    local answer
    kill -0 "$(<"$WORK/front-end.pid")" || return
    echo "$1" >"$ORDERS"
    read -r -t 30 answer <"$ANSWERS" || answer='no answer'
    [[ $answer == "$2"* ]] && echo "$answer" && return
    echo "the front-end: wanted '$2', found '$answer'; the program's log:"
    tail -n 30 "$WORK/run/log"
    return 1
}
progresses() { order 200 progressed; }
# changes COMMAND…: COMMAND is followed by another process that serves.
changes() {
    local before
    before=$(property MainPID)
    "$@"
    within 20 eval "! is MainPID 0 && ! is MainPID $before && is SubState running"
    progresses
}
stays() {
    local before
    before=$(property MainPID)
    "$@"
    progresses
    is MainPID "$before"
}

restarts() { for _ in 1 2 3; do changes inside systemctl restart "$UNIT"; done; }
crashes() {
    local before
    before=$(property NRestarts)
    for _ in 1 2 3; do changes inside systemctl kill --signal KILL --kill-whom main "$UNIT"; done
    is NRestarts $((before + 3))
}
updates() {
    installed "$BACKEND"
    changes inside systemctl reload "$UNIT"
    equal "$(inside stat -c %i /usr/local/bin/vhost-device-vfio)" \
        "$(inside stat -L -c %i "/proc/$(property MainPID)/exe")" "inode of the program that runs"
    contains 'handed over to process' "$WORK/run/log"
    for _ in 1 2; do changes inside systemctl reload "$UNIT"; done
}
updated_process_crashes() {
    crashes
    restarts
}
bad_update() {
    installed /bin/false
    stays inside systemctl reload "$UNIT"
    within 20 contains 'the successor' "$WORK/run/log"
    progresses
    installed "$BACKEND"
}
# The operator's view, also after hand-overs: the control socket is the main process's.
observed() {
    [[ $(property StatusText) == "emulated: serving "*"; DMA coherent" ]] || { property StatusText && return 1; }
    inside /usr/local/bin/vhost-device-vfio ctl status >"$WORK/status" || { cat "$WORK/status" && return 1; }
    grep -qE "^pid +$(property MainPID)\$" "$WORK/status" || { cat "$WORK/status" && return 1; }
}
# The unit's filter of system calls lets the program place its workers, also after restarts and hand-overs.
placed() {
    inside sh -c "cat /proc/$(property MainPID)/task/*/status" | awk '
        $1 == "Name:" { worker = $2 ~ /^vdv-worker-/ }
        $1 == "Cpus_allowed_list:" && worker { print $2 }' | sort | uniq -c >"$WORK/placed"
    equal "2 $CPU" "$(awk '{ print $1, $2 }' "$WORK/placed")" "workers, and their CPU"
}
nothing_lost() {
    order end 'nothing lost'
    within 20 is NFileDescriptorStore 1
}
stop_empties_store() {
    progresses
    inside systemctl stop "$UNIT"
    is ActiveState inactive
    is NFileDescriptorStore 0
    order 200 'error: the server has disconnected'
}

need unshare=util-linux nsenter=util-linux /lib/systemd/systemd=systemd
((EUID == 0)) || die "systemd in its own namespaces needs root; run: sudo scripts/test outside/systemd"
cargo build --quiet --locked --workspace --bins
mkfifo "$ORDERS" "$ANSWERS"
# Open at both ends, so that neither side waits for the other.
exec 8<>"$ORDERS" 9<>"$ANSWERS"
mkdir "$WORK/run"
# The first that it may use.
CPU=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*\([0-9]*\).*/\1/p' /proc/self/status)
DRIVE=emulated:file=/run/vhost-device-vfio/disk,create=on,size=64M,latency=100us,order=random
cat >"$WORK/drop-in.conf" <<END
[Service]
ExecStart=
ExecStart=/usr/local/bin/vhost-device-vfio --queues 2 --cpus $CPU --device $DRIVE --control /run/vhost-device-vfio/control
StandardOutput=append:/run/log
StandardError=append:/run/log
END
unshare --mount sh "$TESTBED_DIR/own_systemd.sh" start "$WORK" "$BACKEND" scripts/systemd/* \
    >"$WORK/start.log" 2>&1 8>&- 9>&- &

claim "systemd starts, and the socket waits for a front-end" systemd_starts
((BROKEN == 0)) || { cat "$WORK/start.log" && finished; }
claim "systemd-analyze finds no fault in the units" no_fault
claim "systemd-analyze gives the service an exposure level of at most 2.0" exposed_little
sed -n 's/^.*Overall exposure level.*: \([0-9.]*\).*/# exposure level \1/p' "$WORK/exposure"
for layout in '' --packed; do
    rings=${layout:+packed rings}
    rings=${rings:-split rings}
    # shellcheck disable=SC2086 # no word if there is none
    claim "$rings: the first front-end starts the program, and systemd keeps its session" connects $layout
    claim "$rings: three restarts leave the front-end connected" restarts
    claim "$rings: so do three crashes" crashes
    claim "$rings: so do three hand-overs, and the installed program serves" updates
    claim "$rings: so do crashes and restarts of the successor" updated_process_crashes
    claim "$rings: a successor that fails changes nothing" bad_update
    claim "$rings: its status names the front-end, and ctl reaches the process that serves" observed
    claim "$rings: its workers run where --cpus says" placed
    claim "$rings: nothing is lost, doubled or reordered, and the front-end leaves nothing in the store" nothing_lost
    inside systemctl stop "$UNIT" 2>"$WORK/stopped"
done
claim "one more front-end" connects
claim "a stop disconnects the front-end and empties the store" stop_empties_store
finished
