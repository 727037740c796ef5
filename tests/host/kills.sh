#!/bin/sh
# profiles: vtd
# minutes: 2
# boot: life
# options: --iops 800
# The backend is killed again and again under a guest whose load checks itself, and QEMU reconnects to the next one. The drive is
# slow, so that many requests are in flight at each kill. One profile is enough: nothing here depends on the kind of IOMMU.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

# kill_and_restart N: kills the backend at another time after its start for each N, most of the time when it serves the guest.
kill_and_restart() {
    case $(($1 % 4)) in
    0) ;; # while QEMU reconnects
    1) within 20 logged 'region .* mapped' ;;
    *)
        within 20 logged 'region .* mapped'
        usleep $((($1 * 37 % 50) * 10000))
        ;;
    esac
    requests_recovered
    kill -KILL "$(cat "$BACKEND_PID")"
    within 20 test -s "$BACKEND_STATUS"
    backend_start --queues 2
}
# killed_under_load KILLS [OPTION of "guest start"]…: afterwards the guest's data are right, no request has failed, and the
# backend holds what it held under the guest before the first kill.
killed_under_load() {
    kills=$1
    shift
    : >/run/recovered
    guest_start --queues 2 --smp 2 --mem 128M --hugepages --reconnect 100 --add stress "$@"
    stress_start 600
    record_resources
    for n in $(seq "$kills"); do kill_and_restart "$n"; done
    within 20 logged 'region .* mapped'
    stress_progresses
    equal "$(cat /run/pinned-before)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-before)" "$(descriptors)" "descriptors"
    stress_stop
    stress_result
    requests_recovered
    [ -s /run/recovered ]
    guest exec -- 'dmesg | grep -iE "i/o error|blk_update_request" && exit 1; exit 0'
    guest stop
}
recovered() { echo "# requests submitted again: $(awk '{ n += $1 } END { print n + 0 }' /run/recovered)"; }
nothing_left() {
    within 15 logged 'front-end disconnected'
    equal "$(cat /run/pinned-idle)" "$(pinned)" "kB pinned"
    equal "$(cat /run/descriptors-idle)" "$(descriptors)" "descriptors"
    # The program and its helper.
    equal 2 "$(pidof vhost-device-vfio | wc -w)" "processes"
}

backend_start --queues 2 || exit
pinned >/run/pinned-idle
descriptors >/run/descriptors-idle
claim "a backend killed 14 times under a load on split rings loses no request, and data verify" killed_under_load 14
recovered
claim "a guest that ends afterwards leaves no pin, descriptor or process" nothing_left
claim "a backend killed 10 times under a load on packed rings loses no request, and data verify" \
    killed_under_load 10 --blk packed=on
recovered
claim "a guest that ends afterwards leaves no pin, descriptor or process" nothing_left
backend_stop
finished
