#!/bin/sh
# profiles: vtd vtd-snoop amd-iommu
# minutes: 1
# boot: shim
# options: --add target/shim:/usr/local/shim --qemu-arg -drive --qemu-arg if=none,id=second,driver=null-co,size=64M,read-zeroes=on --qemu-arg -device --qemu-arg nvme,drive=second,serial=second,addr=5
# KVM is told of non-coherent DMA from outside stock QEMU: where the profile says so and nowhere else, whatever becomes of
# either side. Counted where KVM itself counts, in its kernel functions. What can only be seen where KVM is told is asked there.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

SHIM=/run/kvm.sock
# Another NVMe drive, for a device of QEMU's own; it reads as zeroes.
SECOND=0000:00:05.0

TOLD=kvm_arch_register_noncoherent_dma
UNTOLD=kvm_arch_unregister_noncoherent_dma
DEVICE_MADE=kvm_vfio_create
MAPPED=iommufd_ioas_map_file
WBINVD=kvm_emulate_wbinvd
WRITTEN_BACK=wbinvd_on_cpus_mask

# wanted CASE: how often KVM is to be told, from the profile.
wanted() { sed -n "s/^kvm = .*\\b$1=\\([0-9]*\\).*/\\1/p" /testbed/profile; }
# heard TIMES FUNCTION: since the mark.
heard() { equal "$1" "$(hits_since_mark "$2")" "times the kernel entered $2"; }
# told_again TIMES, untold TIMES: since the mark, and nothing of the other kind.
told_only() { heard "$1" "$TOLD" && heard 0 "$UNTOLD"; }
untold_only() { heard "$1" "$UNTOLD" && heard 0 "$TOLD"; }
shim_says() { /usr/local/shim/examples/ask "$SHIM" >/run/said && grep -E -e "$1" /run/said; }

# A VM with nothing but its firmware, which reads the first block of each disk: enough to have its memory mapped.
firmware_only() {
    "$@" qemu-system-x86_64 -machine q35,memory-backend=ram -accel kvm -m 64M -nodefaults -no-user-config -display none \
        -object memory-backend-memfd,id=ram,size=64M,share=on \
        -chardev "socket,id=vhost0,path=$SOCKET" -device vhost-user-blk-pci,chardev=vhost0 </dev/null >/run/firmware.log 2>&1 &
    vm=$!
}
# one_life TIMES [VARIABLE=VALUE]…: a VM's beginning and end, in which KVM is to be told so many times.
one_life() {
    times=$1
    shift
    mapped=$(times_logged 'region .* mapped' || true)
    left=$(times_logged 'front-end disconnected' || true)
    mark
    firmware_only env "$@"
    within 20 logged_more_than "$mapped" 'region .* mapped'
    told_only "$times"
    kill -9 "$vm"
    within 10 logged_more_than "$left" 'front-end disconnected'
    within 10 heard "$times" "$UNTOLD"
    heard "$times" "$TOLD"
}
every_policy() {
    for policy in suppress allow refuse assume; do
        echo "policy $policy"
        backend_start --no-snoop "$policy" --kvm-socket "$SHIM"
        one_life 0
        one_life "$(wanted "$policy")" LD_PRELOAD=/usr/local/lib/libkvm_vfio_shim.so "KVM_VFIO_SHIM_SOCKET=$SHIM"
        backend_stop
    done
}

# own_tests PROGRAM: of frontend-shim; where there is no KVM some of them only say so.
own_tests() {
    SHIM_LIBRARY=/usr/local/shim/libkvm_vfio_shim.so "/usr/local/shim/deps/$1" --nocapture --test-threads 1 >/run/said 2>&1 || {
        tail -n 30 /run/said
        return 1
    }
    lacks 'not tested' /run/said
}

told_first() {
    told_only "$(wanted assume)"
    [ "$(wanted assume)" = 0 ] ||
        equal "$TOLD" "$(grep -oE "$TOLD|$MAPPED" "$TRACING/trace" | head -n 1)" "what came first"
    shim_says "policy=lock .* registered=1 told=$(wanted assume) kept=false"
}
executed() { [ "$(hits_since_mark "$WBINVD")" -gt 0 ]; }
written_back() {
    mark
    # A processor that goes off line executes it last.
    guest exec -- 'echo 0 >/sys/devices/system/cpu/cpu1/online'
    within 10 executed
    heard $(($(hits_since_mark "$WBINVD") * $(wanted assume))) "$WRITTEN_BACK"
}
no_rights() {
    vfio-rights "$(cat "$BACKEND_PID")" >/run/owner
    contains 'read=done mmap=done' /run/owner
    vfio-rights "$(guest pid)" >/run/handed-over
    equal "$(wanted assume)" "$(wc -l </run/handed-over)" "files handed over"
    equal "$(wanted assume)" "$(grep -c ' bind=22 info=22 read=22 mmap=22$' /run/handed-over)" "files without rights"
}

both_drives_work() {
    guest exec -- '
        n=0; until [ -b /dev/nvme0n1 ]; do [ $n -lt 200 ] || exit 11; n=$((n + 1)); usleep 100000; done
        grep -q second /sys/block/nvme0n1/device/serial || exit 12
        dd if=/dev/nvme0n1 of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null || exit 13
        dd if=/dev/vda of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null || exit 14'
}
own_drive_gone() {
    guest qmp device_del '{"id":"own"}'
    guest exec -- 'n=0; while [ -e /dev/nvme0 ]; do [ $n -lt 200 ] || exit 11; n=$((n + 1)); usleep 100000; done'
    within 10 released
}
# QEMU lets go of it after the guest has.
released() { ! guest qmp qom-get '{"path":"/machine/peripheral/own","property":"type"}'; }
plugged() {
    mark
    guest qmp device_add "{\"driver\":\"vfio-pci\",\"id\":\"own\",\"host\":\"$SECOND\",\"bus\":\"rp\"}"
    both_drives_work
    # Told already, if at all.
    told_only 0
}
unplugged() {
    mark
    own_drive_gone
    untold_only 0
    verifying --size=8M
}

backend_killed() {
    mark
    kill -9 "$(cat "$BACKEND_PID")"
    within 30 test -s "$BACKEND_STATUS"
    # Less than a megabyte: the guest's memory is not.
    [ "$(pages_pinned)" -lt 256 ]
    # It takes the function, so nobody else has it.
    iommu-probe >/dev/null
    guest exec -- true
    within 10 shim_says 'registered=0 '
}
kept() {
    backend_killed
    untold_only 0
    case $(wanted assume) in
    0) shim_says 'told=0 kept=false' ;;
    *) shim_says 'told=0 kept=true' ;;
    esac
}
backend_again() {
    backend_start --no-snoop assume --kvm-socket "$SHIM"
    within 20 logged 'region .* mapped'
    verifying --size=8M
    shim_says "registered=1 told=$(wanted assume) kept=false"
}
registered_again() {
    mark
    backend_again
    told_only 0
}
vm_killed() {
    mark
    guest kill
    within 10 logged 'front-end disconnected'
    within 10 untold_only "$(wanted assume)"
    within 10 nothing_more_pinned
    ! logged 'ERROR' >/dev/null
}
nothing_more_pinned() { equal "$(cat /run/pinned-serving)" "$(pages_pinned)" "pages pinned"; }

own_first() {
    mark
    export KVM_VFIO_SHIM_POLICY=dynamic
    shim_guest_start --qemu-arg -object --qemu-arg iommufd,id=iommufd --qemu-arg -device \
        --qemu-arg "vfio-pci,id=own,host=$SECOND,iommufd=iommufd,bus=rp"
    told_only "$(wanted own)"
    heard 1 "$DEVICE_MADE"
    shim_says "policy=dynamic .* registered=1 told=$(wanted assume) kept=false"
    both_drives_work
}
untold_and_told() {
    backend_killed
    untold_only "$(wanted assume)"
    mark
    backend_again
    told_only "$(wanted assume)"
}

# A guest with the shim in its QEMU, and a port for a device of its own.
shim_guest_start() {
    guest_start --shim "$SHIM" --mem 256M --reconnect 500 --timeout 300 \
        --qemu-arg -device --qemu-arg pcie-root-port,id=rp,slot=1,chassis=1 "$@"
}

probe "$TOLD" "$UNTOLD" "$DEVICE_MADE" "$MAPPED" "$WBINVD" "$WRITTEN_BACK"
bind_to_vfio "$SECOND"

if [ "$PROFILE" = vtd ]; then
    for program in kvm_vfio_shim hooks qemu; do
        claim "the shim's own tests pass where there is KVM: $program" own_tests "$program"
    done
fi
claim "KVM is told as the profile says for each policy, with the shim and without" every_policy
# The rest on one profile where KVM is told and on one where it is not. To the shim and to KVM an IOMMU is no more than that
# answer: amd-iommu gives the one of vtd-snoop, as has just been seen, and would only repeat what is seen there.
[ "$PROFILE" != amd-iommu ] || finished

backend_start --no-snoop assume --kvm-socket "$SHIM" || exit
pages_pinned >/run/pinned-serving
echo >$TRACING/trace
mark
shim_guest_start --smp 2 --qemu-arg -sandbox \
    --qemu-arg on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny || exit
claim "in its sandbox, too, QEMU tells KVM, before guest memory is mapped" told_first
claim "a guest's WBINVD writes caches back where KVM was told, and only there" written_back
claim "a file handed over gives no right to the device" no_rights
claim "a device that QEMU takes itself works beside ours" plugged
claim "and can go, while ours goes on" unplugged
claim "a backend that is killed lets go of device and memory at once, and KVM's answer stays" kept
claim "the next backend registers again, KVM hears nothing new, and data verify" registered_again
claim "a virtual machine that is killed is forgotten once, its memory unpinned" vm_killed

if [ "$(wanted own)" -gt 0 ]; then
    claim "the next one, in which QEMU's own device came first, has one kvm-vfio device" own_first
    claim "QEMU's own device goes, KVM's answer follows the backend's" own_drive_gone
    claim "with policy dynamic it follows every backend" untold_and_told
    guest kill
fi
backend_stop
finished
