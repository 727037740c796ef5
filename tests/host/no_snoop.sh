#!/bin/sh
# profiles: vtd
# minutes: 1
# options: --qemu trixie-backports --function size=64M,queues=2
# A function of this machine whose Enable No Snoop bit can really be set, which none of QEMU's has. The bit that counts is the
# one that this machine reads past VFIO, from the function's own configuration space. On one profile: QEMU's VT-d enforces
# snooping for no function that is itself served over vfio-user.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

FUNCTION=0000:00:08.0
CONFIG=/sys/bus/pci/devices/$FUNCTION/config
SHIM=/run/kvm.sock

# PCIe 6.0 §7.5.3.4: Enable No Snoop is bit 11 of Device Control, bit 3 of its high byte.
# no_snoop_at CONFIG: prints where that byte is. With it, in this machine and in the guest: no_snoop CONFIG prints 0 or 8, and
# set_no_snoop CONFIG VALUE writes the bit alone.
cat >/run/bit.sh <<'END'
byte() { od -An -tu1 -j"$2" -N1 "$1" | tr -d ' '; }
no_snoop_at() {
    cap=$(byte "$1" 52)
    until [ "$(byte "$1" "$cap")" = 16 ]; do cap=$(byte "$1" $((cap + 1))); done
    echo $((cap + 9))
}
no_snoop() { echo $(($(byte "$1" "$(no_snoop_at "$1")") & 8)); }
set_no_snoop() {
    at=$(no_snoop_at "$1")
    printf "\\$(printf %03o $(($(byte "$1" "$at") & ~8 | $2)))" | dd of="$1" bs=1 seek="$at" conv=notrunc 2>/dev/null
}
END
. /run/bit.sh
# in_guest SCRIPT: with the functions above, and CONFIG for the function's configuration space there.
in_guest() {
    guest exec --timeout 200 -- "$(cat /run/bit.sh)
        n=0; until [ -b /dev/nvme0n1 ]; do [ \$n -lt 600 ] || exit 1; n=\$((n + 1)); usleep 100000; done
        at=\$(readlink -f /sys/block/nvme0n1/device/device); CONFIG=\$at/config; $*"
}
physical_bit() { equal "$1" "$(no_snoop "$CONFIG")" "the physical bit"; }
unused() { [ -z "$(pidof vhost-device-vfio)" ]; }
# What a failed claim has left behind.
clean_up() {
    guest kill 2>/dev/null || true
    for file in /run/backend.pid /run/drive.pid; do [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true; done
    within 10 unused
}
boots() { guest start --mem 256M --smp 1 --hugepages --timeout 300 --allow-reset --shim "$SHIM" "$@"; }
verifies() {
    guest exec --timeout 200 -- "fio --name=verify --filename=$1 --direct=1 --rw=randrw --bsrange=512-128k --blockalign=512 --size=8M \
        --iodepth=8 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --output=/tmp/fio.log || { cat /tmp/fio.log; exit 1; }"
}

can_be_set() {
    bind_to_vfio "$FUNCTION"
    for value in 0 8 0 8; do
        set_no_snoop "$CONFIG" "$value"
        physical_bit "$value"
    done
    vhost-device-vfio inspect "$FUNCTION" >/run/inspected
    contains 'the bit can be set and cleared' /run/inspected
}
clear_as_disk() {
    set_no_snoop "$CONFIG" 8
    backend_start
    physical_bit 0
    guest_start --mem 256M --smp 1 --hugepages
    verifies /dev/vda
    physical_bit 0
    guest stop
    backend_stop
}
# With trapped BARs: when the guest resets this function and its BAR is mapped, nested KVM of this emulation gives the guest up
# (internal error, suberror 3). Configuration space takes the same way with both.
clear_whole() {
    clean_up
    set_no_snoop "$CONFIG" 8
    serve_whole drive "$FUNCTION" --bars trapped
    boots --qemu-arg -device --qemu-arg "$(vfio_user_device drive)"
    in_guest 'set_no_snoop "$CONFIG" 8; [ "$(no_snoop "$CONFIG")" = 0 ]'
    physical_bit 0
    verifies /dev/nvme0n1
}
clear_after_resets() {
    use_process drive
    in_guest 'echo 1 >"$at/reset"; [ "$(no_snoop "$CONFIG")" = 0 ]; set_no_snoop "$CONFIG" 8; [ "$(no_snoop "$CONFIG")" = 0 ]'
    physical_bit 0
    guest qmp system_reset
    guest ready --timeout 300
    in_guest '[ "$(no_snoop "$CONFIG")" = 0 ]'
    physical_bit 0
    verifies /dev/nvme0n1
    guest stop
    backend_stop
}
refused() {
    clean_up
    vhost-device-vfio --vfio-user --socket-path /run/no.sock --device "$FUNCTION" --no-snoop refuse >/run/refused 2>&1 && return 1
    contains 'refused: the device can bypass the CPU caches and --no-snoop=refuse was given' /run/refused
}
# left_to_the_guest TIMES [ARGUMENT…]: served so, what the guest writes is what the function has, and KVM is told so often.
left_to_the_guest() {
    told=$1
    shift
    clean_up
    serve_whole drive "$FUNCTION" --kvm-socket "$SHIM" "$@"
    mark
    boots --qemu-arg -device --qemu-arg "$(vfio_user_device drive)"
    for value in 8 0 8; do
        in_guest "set_no_snoop \"\$CONFIG\" $value; [ \"\$(no_snoop \"\$CONFIG\")\" = $value ]"
        physical_bit "$value"
    done
    equal "$told" "$(hits_since_mark kvm_arch_register_noncoherent_dma)" "times KVM was told"
    verifies /dev/nvme0n1
    guest stop
    backend_stop
}

claim "from this machine the bit can be set and cleared, and inspect finds that out" can_be_set
probe kvm_arch_register_noncoherent_dma
claim "as a disk: the bit is clear from the start, and data verify" clear_as_disk
claim "whole: a guest that sets the bit changes nothing, and data verify" clear_whole
claim "it is clear after the guest has reset the function, and after a reset of the virtual machine" clear_after_resets
claim "--no-snoop=allow: the bit is left to the guest, and KVM is told" left_to_the_guest 1 --no-snoop allow
claim "--no-snoop=refuse: a bit that can be set is refused" refused
finished
