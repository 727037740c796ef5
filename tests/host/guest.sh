#!/bin/sh
# profiles: vtd
# minutes: 0.6
# boot: plain
# The guest and its helper programs, with qemu-storage-daemon instead of the backend.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

qemu-storage-daemon \
    --blockdev driver=nvme,node-name=drive,device="$FUNCTION",namespace=1 \
    --export "type=vhost-user-blk,id=export,node-name=drive,writable=on,addr.type=unix,addr.path=$SOCKET" &
within 20 listens "$SOCKET"

guest_is_up() { guest_start --append guest_was=here; }
status_passes() {
    status=0
    guest exec -- 'echo said in the guest; exit 7' >/run/said || status=$?
    equal 7 "$status" "exit status"
    equal 'said in the guest' "$(cat /run/said)" output
}
own_kernel_arguments() { guest exec -- 'grep -q guest_was=here /proc/cmdline'; }
verified_io() {
    guest exec -- 'fio --name=verify --filename=/dev/vda --rw=randwrite --bs=4k --size=4M --direct=1 \
        --ioengine=io_uring --iodepth=8 --verify=crc32c --do_verify=1 --verify_fatal=1'
}
qmp_works() {
    guest qmp stop
    guest qmp query-status >/run/said
    contains '"running": false' /run/said
    guest qmp cont
}
qmp_reports() { ! guest qmp no-such-command; }
slow_script() {
    status=0
    guest exec --timeout 2 -- 'sleep 100' || status=$?
    equal 124 "$status" "exit status"
}
killed() {
    guest kill
    status=0
    guest exec -- true || status=$?
    equal 125 "$status" "exit status"
}
panicking() {
    status=0
    guest-run -- 'echo c >/proc/sysrq-trigger' 2>/run/said || status=$?
    equal 125 "$status" "exit status"
    contains 'Kernel panic' /run/said
}
huge_pages() { guest-run --mem 256M --hugepages -- 'true'; }

claim "a guest boots on KVM, in stock QEMU" guest_is_up
claim "a guest gets additional kernel arguments" own_kernel_arguments
claim "the output and the status of a guest's script are returned" status_passes
claim "fio in a guest writes and verifies" verified_io
claim "QMP stops a guest and continues it" qmp_works
claim "an error from QMP is an error of 'guest qmp'" qmp_reports
claim "a guest's script that hangs ends with status 124" slow_script
claim "a killed guest is noticed" killed
claim "a guest's kernel panic is noticed and shown" panicking
claim "a guest runs on huge pages" huge_pages
finished
