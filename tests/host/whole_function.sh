#!/bin/sh
# profiles: vtd
# minutes: 3.3
# options: --qemu trixie-backports --mem 5G --qemu-arg -netdev --qemu-arg hubport,id=a,hubid=0 --qemu-arg -netdev --qemu-arg hubport,id=b,hubid=0 --qemu-arg -device --qemu-arg pcie-root-port,id=nicport,slot=9,chassis=9,addr=6 --qemu-arg -device --qemu-arg virtio-net-pci,bus=nicport,netdev=a,vectors=0,iommu_platform=on,mac=52:54:00:00:00:0a --qemu-arg -device --qemu-arg virtio-net-pci,netdev=b,addr=12,mac=52:54:00:00:00:0b --qemu-arg -device --qemu-arg edu,addr=7
# Whole functions given to a guest over vfio-user, in stock QEMU: a drive, a network card and QEMU's educational device, each with
# the guest's own driver and served by its own process; and events in the life of the virtual machine.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

# It has no MSI-X, so its interrupts are INTx. QEMU 11.1 aborts when a function with MSI-X is unplugged.
NIC=0000:01:00.0
EDU=0000:00:07.0
SHIM=/run/kvm.sock
# QEMU's monitor for the backends.
MONITOR=/run/unplug.sock

# A guest whose functions are behind root ports, so that they can be plugged and unplugged.
guest_with() {
    name=$1
    shift
    guest start --mem "${MEMORY:-256M}" --smp 1 --timeout 300 --allow-reset --shim "$SHIM" \
        --qemu-arg -m --qemu-arg "${MEMORY:-256M},slots=2,maxmem=2G" \
        --qemu-arg -qmp --qemu-arg "unix:$MONITOR,server=on,wait=off" \
        --qemu-arg -device --qemu-arg pcie-root-port,id=rp0,slot=1,chassis=1 \
        --qemu-arg -device --qemu-arg pcie-root-port,id=rp1,slot=2,chassis=2 \
        --qemu-arg -device --qemu-arg "$(vfio_user_device "$name" '"bus":"rp0"')" "$@"
}
in_guest() { guest exec --timeout 300 -- "$@"; }
has_drive() { in_guest 'n=0; until [ -b /dev/nvme0n1 ]; do [ $n -lt 300 ] || exit 1; n=$((n + 1)); usleep 100000; done'; }
pins_agree() { equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"; }

finds_drive() {
    has_drive
    equal 268435456 "$(in_guest 'blockdev --getsize64 /dev/nvme0n1')" "bytes"
    logged 'DMA is coherent: the device never sets No Snoop'
    pins_agree
    [ "$(pinned)" -gt 260000 ]
}
file_system() {
    in_guest 'set -e; mkfs.ext4 -q /dev/nvme0n1; mount /dev/nvme0n1 /mnt; dd if=/dev/urandom of=/mnt/f bs=1M count=16 2>/dev/null
        sync; sha256sum /mnt/f >/tmp/before; echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /tmp/before; umount /mnt
        fio --name=verify --filename=/dev/nvme0n1 --direct=1 --rw=randrw --bsrange=512-256k --blockalign=512 --size=24M \
            --iodepth=16 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --output=/tmp/fio.log || { cat /tmp/fio.log; exit 1; }'
}
# While the guest does I/O, the backend does not run.
backend_not_involved() {
    use_process drive
    before=$(context_switches) ticks=$(cpu_ticks)
    in_guest 'fio --name=load --filename=/dev/nvme0n1 --direct=1 --rw=randread --bs=4k --number_ios=10000 --size=64M \
        --iodepth=32 --ioengine=io_uring --minimal >/tmp/load && grep -o "^[^;]*;[^;]*" /tmp/load >/dev/null'
    equal "$before" "$(context_switches)" "times the process ran while the guest did 10,000 reads"
    equal "$ticks" "$(cpu_ticks)" "clock ticks it used"
}
rebinds() {
    in_guest 'set -e; at=$(basename "$(readlink -f /sys/block/nvme0n1/device/device)")
        for i in $(seq 20); do
            echo "$at" >/sys/bus/pci/drivers/nvme/unbind; echo "$at" >/sys/bus/pci/drivers/nvme/bind
            n=0; until [ -b /dev/nvme0n1 ]; do [ $n -lt 300 ] || exit 1; n=$((n + 1)); usleep 100000; done
            dd if=/dev/nvme0n1 of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null
        done'
}
reboots() {
    guest qmp system_reset
    guest ready --timeout 300
    has_drive
    in_guest 'mount /dev/nvme0n1 /mnt 2>/dev/null || true; dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null'
    pins_agree
}
no_snoop_bit_is_read_in_the_guest() {
    # On this drive the bit is hardwired to 0. tests/host/no_snoop.sh has a function where it can be set.
    in_guest 'set -e; at=$(readlink -f /sys/block/nvme0n1/device/device); cap=$(od -An -tu1 -j52 -N1 "$at/config"); n=0
        while [ "$(od -An -tu1 -j$cap -N1 "$at/config" | tr -d " ")" != 16 ]; do
            cap=$(od -An -tu1 -j$((cap + 1)) -N1 "$at/config"); n=$((n + 1)); [ $n -lt 48 ]; done
        printf "\010" | dd of="$at/config" bs=1 seek=$((cap + 9)) conv=notrunc 2>/dev/null
        [ $(($(od -An -tu1 -j$((cap + 9)) -N1 "$at/config") & 8)) = 0 ]'
    equal 0 "$(($(od -An -tu1 -j"$(express_capability)" -N1 "/sys/bus/pci/devices/$FUNCTION/config") & 8))" "the physical bit"
}
# Offset of the high byte of Device Control in the drive's configuration space.
express_capability() {
    at=/sys/bus/pci/devices/$FUNCTION/config
    cap=$(od -An -tu1 -j52 -N1 "$at" | tr -d ' ')
    until [ "$(od -An -tu1 -j"$cap" -N1 "$at" | tr -d ' ')" = 16 ]; do cap=$(od -An -tu1 -j$((cap + 1)) -N1 "$at" | tr -d ' '); done
    echo $((cap + 9))
}

dimm_comes_and_goes() {
    in_guest '(fio --name=load --filename=/dev/nvme0n1 --direct=1 --rw=randread --bs=64k --size=64M --time_based --runtime=200 \
        --iodepth=4 --ioengine=io_uring >/tmp/load 2>&1; echo $? >/tmp/loaded) >/dev/null 2>&1 & sleep 1'
    guest qmp object-add '{"qom-type":"memory-backend-memfd","id":"m1","size":134217728,"share":true}'
    guest qmp device_add '{"driver":"pc-dimm","id":"dimm","memdev":"m1"}'
    within 40 logged 'DMA map 0x100000000\+128M in'
    pins_agree
    with=$(pinned)
    sleep 3
    guest qmp device_del '{"id":"dimm"}'
    within 60 logged 'DMA unmap 0x100000000\+128M'
    equal $((with - 131072)) "$(pinned)" "kB pinned"
    in_guest '[ ! -e /tmp/loaded ]; killall fio; sleep 1; ! grep -qiE "error|verify" /tmp/load'
}

network_answers() {
    in_guest 'set -e; n=0; until [ -e /sys/class/net/eth0 ]; do [ $n -lt 300 ] || exit 1; n=$((n + 1)); usleep 100000; done
        ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up'
    within 20 ping -c 1 -W 1 10.9.0.2
}
network() {
    serve_whole nic "$NIC" --kvm-socket "$SHIM"
    ifconfig eth0 10.9.0.1 netmask 255.255.255.0 up
    guest qmp device_add "$(vfio_user_device nic '"bus":"rp1"')"
    network_answers
    equal "$(ledger)" "$(pinned)" "kB that the second process has pinned"
}
moves_data() {
    dd if=/dev/urandom of=/run/blob bs=1M count=16 2>/dev/null
    blobs() { for _ in 1 2 3 4; do cat /run/blob; done; }
    # nc would stop listening at the end of its input, so "sleep" keeps the input open.
    in_guest '(sleep 1000 | nc -l -p 7000 >/tmp/blob; : >/tmp/received) >/dev/null 2>&1 & sleep 1'
    blobs | timeout 200 nc 10.9.0.2 7000
    equal 67108864 "$(in_guest 'n=0; until [ "$(stat -c %s /tmp/blob)" = 67108864 ] || [ $n -ge 600 ]; do n=$((n + 1)); usleep 100000; done
        stat -c %s /tmp/blob')" "bytes that arrived"
    equal "$(blobs | sha256sum)" "$(in_guest 'sha256sum </tmp/blob')" "64 MiB over the wire"
    rm /run/blob
    in_guest 'rm /tmp/blob; killall sleep'
}
# unbound FUNCTION: the host unbinds it from vfio-pci, and the backend gives it back.
unbound() {
    echo "$1" >/sys/bus/pci/drivers/vfio-pci/unbind
    within 20 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status"
    [ ! -e "/sys/bus/pci/devices/$1/driver" ]
}
drive_works() {
    use_process drive
    in_guest 'dd if=/dev/nvme0n1 of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null'
}
qemu_has() { guest qmp qom-list '{"path":"/machine/peripheral"}' | grep -q "\"name\": \"$1\""; }
qemu_lacks() { if qemu_has "$1"; then return 1; fi; }
# The virtual machine has two functions. QEMU would abort if the other one, with MSI-X, were unplugged.
unplugged_by_the_monitor() {
    use_process nic
    before=$(times_logged 'front-end disconnected' || true)
    guest qmp device_del '{"id":"nic"}'
    within 30 logged_more_than "$before" 'front-end disconnected'
    backend_stop
    serve_whole nic "$NIC" --kvm-socket "$SHIM" --qmp-socket "$MONITOR"
    guest qmp device_add "$(vfio_user_device nic '"bus":"rp1"')"
    network_answers
    unbound "$NIC"
    logged 'QEMU has asked the guest to eject /machine/peripheral/nic$'
    logged 'front-end disconnected: .*: it has left;'
    in_guest '[ ! -e /sys/class/net/eth0 ]'
    qemu_lacks nic
    qemu_has drive
    drive_works
}
# A vfio-user server cannot ask QEMU 11.1 to release a function. With trapped BARs QEMU holds no file of the device.
given_back() {
    bind_to_vfio "$NIC"
    serve_whole nic "$NIC" --kvm-socket "$SHIM" --bars trapped
    guest qmp device_add "$(vfio_user_device nic '"bus":"rp1"')"
    network_answers
    unbound "$NIC"
    logged 'the host wants the device back; the virtual machine has set no eventfd'
    logged 'front-end disconnected: .*: the host wants the device back'
    drive_works
}
unplugged_and_plugged() {
    use_process nic
    for _ in 1 2; do
        before=$(times_logged 'front-end disconnected' || true)
        guest qmp device_del '{"id":"nic"}'
        within 30 logged_more_than "$before" 'front-end disconnected'
        nothing_pinned
        guest qmp device_add "$(vfio_user_device nic '"bus":"rp1"')"
        network_answers
    done
}
killed() {
    use_process drive
    in_guest '(fio --name=load --filename=/dev/nvme0n1 --direct=1 --rw=randread --bs=4k --size=64M --time_based --runtime=200 \
        --iodepth=32 --ioengine=io_uring >/dev/null 2>&1) >/dev/null 2>&1 & sleep 1'
    before=$(times_logged 'front-end disconnected' || true)
    guest kill
    within 15 logged_more_than "$before" 'front-end disconnected'
    nothing_pinned
}

trapped_works() {
    guest_with drive
    has_drive
    in_guest 'dd if=/dev/nvme0n1 of=/dev/null bs=4k count=500 iflag=direct 2>/dev/null'
    [ "$(times_logged 'the front-end may map')" = 0 ]
    unbound "$FUNCTION"
    messages=$(sed -n 's/.*region_writes=\([0-9]*\).*/\1/p' "$BACKEND_LOG" | tail -n 1)
    [ "$messages" -ge 1000 ]
    echo "region_writes=$messages for about 500 reads" >/run/trapped
}
# QEMU 11.1.3 would abort. The backend has a monitor, and has been told to give the drive back.
msix_is_not_unplugged() {
    logged 'QEMU is not asked to unplug it, because it aborts when a vfio-user function with MSI-X is unplugged'
    logged 'front-end disconnected: .*: the host wants the device back'
    qemu_has drive
    guest kill
    bind_to_vfio "$FUNCTION"
    serve_whole drive "$FUNCTION" --bars trapped --kvm-socket "$SHIM"
}
# QEMU waits 5 s. It takes a reply that comes later for a broken stream, and uses the function no more.
late_reply() {
    guest_with drive
    has_drive
    kill -STOP "$(cat "$BACKEND_PID")"
    in_guest 'od -An -tx4 -N4 "$(readlink -f /sys/block/nvme0n1/device/device)/config"' >/run/late
    kill -CONT "$(cat "$BACKEND_PID")"
    contains 'ffffffff' /run/late
    within 20 contains 'unexpected reply' /run/guest-guest/qemu.log
    qemu_has drive
    in_guest true
    guest kill
    within 15 logged 'front-end disconnected'
    nothing_pinned
}
ends_at_once() {
    guest_with drive
    has_drive
    kill -TERM "$(cat "$BACKEND_PID")"
    within 5 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status"
    [ ! -e "$SOCKET" ]
    guest kill
}

edu_needs_the_shim() {
    vhost-device-vfio --vfio-user --socket-path /run/no.sock --device "$EDU" >/run/refused 2>&1 && return 1
    contains 'KVM' /run/refused
}
# No shim listens there: the front-end gets an errno, the log has the reason, and the machine keeps running.
refused_at_the_version() {
    serve_whole edu "$EDU" --kvm-socket /run/nobody.sock
    guest qmp device_add "$(vfio_user_device edu '"bus":"rp1"')" >/run/refused 2>&1 && return 1
    cat /run/refused
    contains 'Operation not permitted' /run/refused
    logged 'refused: the device can bypass the CPU caches, and KVM cannot be told'
    nothing_pinned
    backend_stop
    in_guest true
    use_process drive
}

# The guest starts DMA itself: to its own memory, and to an address without memory.
edu_copies() {
    serve_whole edu "$EDU" --kvm-socket "$SHIM" --qmp-socket "$MONITOR"
    MEMORY=128M
    # With the policy "lock" the shim keeps a file of the device until QEMU ends, and the host would wait for that.
    export KVM_VFIO_SHIM_POLICY=dynamic
    guest_with edu --add edu-dma
    logged "registered: "
    equal copied "$(in_guest 'edu-dma copy')"
}
edu_faults() {
    use_process edu
    faults=$(dmesg | grep -c 'DMAR:.*fault' || true)
    # Past the end of guest memory, and within the 28 bits that the device can address.
    equal finished "$(in_guest 'edu-dma aim 0xf000000')"
    [ "$(dmesg | grep -c 'DMAR:.*fault')" -gt "$faults" ]
    equal copied "$(in_guest 'edu-dma copy')"
}
# KVM is told that it is gone, so that no file of the device keeps the host waiting.
edu_unplugged_by_the_monitor() {
    use_process edu
    unbound "$EDU"
    logged 'QEMU has asked the guest to eject /machine/peripheral/edu$'
    logged 'front-end disconnected: .*: it has left;'
    [ "$(statistic staged)" -gt 0 ]
    equal "" "$(in_guest 'grep -l 0x1234 /sys/bus/pci/devices/*/vendor || true')" "the device in the guest"
    qemu_lacks edu
}
# A guest that is paused ejects nothing. When it runs again, it does.
taken_from_a_paused_guest() {
    bind_to_vfio "$EDU"
    serve_whole edu "$EDU" --kvm-socket "$SHIM" --qmp-socket "$MONITOR" --bars trapped
    guest qmp device_add "$(vfio_user_device edu '"bus":"rp0"')"
    guest qmp stop
    unbound "$EDU"
    logged 'QEMU has asked the guest to eject /machine/peripheral/edu$'
    logged 'front-end disconnected: .*: the host wants the device back, and the virtual machine has not unplugged it in 10 s;'
    qemu_has edu
    guest qmp cont
    in_guest true
    within 20 qemu_lacks edu
    guest kill
}

bind_to_vfio "$NIC"
bind_to_vfio "$EDU"
serve_whole drive "$FUNCTION" --kvm-socket "$SHIM" || exit
guest_with drive || exit
claim "the guest's own nvme driver finds the drive, all of its memory pinned by ledger and kernel" finds_drive
claim "a file system and a verifying load work on it" file_system
claim "10,000 reads of the guest cost the backend no processor time and no system call" backend_not_involved
claim "Enable No Snoop, written by the guest, stays 0" no_snoop_bit_is_read_in_the_guest
claim "its driver is unbound and bound twenty times" rebinds
claim "the virtual machine reboots and finds it again" reboots
claim "a DIMM is plugged and unplugged under load, mapped and unmapped alone" dimm_comes_and_goes
claim "a function that must be registered with KVM is refused without a shim, and the machine keeps running" \
    refused_at_the_version
claim "a second function from a second process is plugged in, with one shim, and the network answers" network
claim "64 MiB cross it unchanged" moves_data
claim "it is unplugged, everything unpinned, and plugged in again, twice" unplugged_and_plugged
claim "with QEMU's monitor the guest ejects it when the host unbinds it, and no other function" unplugged_by_the_monitor
claim "without the monitor its process releases it in bounded time, the machine and the drive keep running" given_back
claim "a virtual machine killed under load leaves nothing pinned" killed
backend_stop
serve_whole drive "$FUNCTION" --bars trapped --kvm-socket "$SHIM" --qmp-socket "$MONITOR" || exit
claim "with trapped BARs each doorbell is a message, and the front-end gets no file" trapped_works
claim "a function with MSI-X is taken in bounded time and not unplugged, so QEMU goes on" msix_is_not_unplugged
claim "a device with an unknown No Snoop bit is refused without a shim, because KVM cannot be told" edu_needs_the_shim
claim "with a shim KVM is told, and the device copies guest memory for the guest" edu_copies
claim "DMA to an address that is not mapped faults in the IOMMU and has no other effect" edu_faults
claim "the guest ejects it when the host unbinds it, and the host has it back" edu_unplugged_by_the_monitor
claim "a guest that is paused does not keep it: the host has it back in bounded time" taken_from_a_paused_guest
claim "a reply after QEMU's time-out costs the guest the function, and neither the machine nor the process" late_reply
claim "SIGTERM ends the process at once while a guest has the function" ends_at_once
echo "# trapped: $(cat /run/trapped)"
finished
