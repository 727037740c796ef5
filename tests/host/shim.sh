#!/bin/sh
# profiles: vtd vtd-snoop amd-iommu
# minutes: 1
# boot: shim
# options: --add target/shim:/usr/local/shim --qemu-arg -drive --qemu-arg if=none,id=second,driver=null-co,size=64M,read-zeroes=on --qemu-arg -device --qemu-arg nvme,drive=second,serial=second,addr=5
# A backend registers non-coherent DMA with the KVM of a stock QEMU: where the profile says so and nowhere else, also when either
# side is killed. The test counts calls of KVM's own kernel functions.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

SHIM=/run/kvm.sock
# Another NVMe drive, which QEMU itself owns; it reads as zeroes.
SECOND=0000:00:05.0

REGISTER=kvm_arch_register_noncoherent_dma
UNREGISTER=kvm_arch_unregister_noncoherent_dma
DEVICE_MADE=kvm_vfio_create
MAPPED=iommufd_ioas_map_file
WBINVD=kvm_emulate_wbinvd
WRITTEN_BACK=wbinvd_on_cpus_mask

# wanted CASE: how many registrations KVM must get, from the profile.
wanted() { sed -n "s/^kvm = .*\\b$1=\\([0-9]*\\).*/\\1/p" /testbed/profile; }
# kernel_calls TIMES FUNCTION: the kernel has entered FUNCTION that often since the mark.
kernel_calls() { equal "$1" "$(hits_since_mark "$2")" "times the kernel entered $2"; }
# registered_only TIMES, unregistered_only TIMES: calls of this kind since the mark, and none of the other.
registered_only() { kernel_calls "$1" "$REGISTER" && kernel_calls 0 "$UNREGISTER"; }
unregistered_only() { kernel_calls "$1" "$UNREGISTER" && kernel_calls 0 "$REGISTER"; }
shim_status() { /usr/local/shim/examples/ask "$SHIM" >/run/said && grep -E -e "$1" /run/said; }

# Starts a VM that runs only its firmware. The firmware reads the first block of each disk, so its memory gets mapped.
firmware_only() {
    "$@" qemu-system-x86_64 -machine q35,memory-backend=ram -accel kvm -m 64M -nodefaults -no-user-config -display none \
        -object memory-backend-memfd,id=ram,size=64M,share=on \
        -chardev "socket,id=vhost0,path=$SOCKET" -device vhost-user-blk-pci,chardev=vhost0 </dev/null >/run/firmware.log 2>&1 &
    vm=$!
}
# vm_lifetime TIMES [VARIABLE=VALUE]…: starts and kills a VM; KVM gets TIMES registrations and as many unregistrations.
vm_lifetime() {
    times=$1
    shift
    mapped=$(times_logged 'region .* mapped' || true)
    left=$(times_logged 'front-end disconnected' || true)
    mark
    firmware_only env "$@"
    within 20 logged_more_than "$mapped" 'region .* mapped'
    registered_only "$times"
    kill -9 "$vm"
    within 10 logged_more_than "$left" 'front-end disconnected'
    within 10 kernel_calls "$times" "$UNREGISTER"
    kernel_calls "$times" "$REGISTER"
}
every_policy() {
    for policy in suppress allow refuse assume; do
        echo "policy $policy"
        backend_start --no-snoop "$policy" --kvm-socket "$SHIM"
        vm_lifetime 0
        vm_lifetime "$(wanted "$policy")" LD_PRELOAD=/usr/local/lib/libkvm_vfio_shim.so "KVM_VFIO_SHIM_SOCKET=$SHIM"
        backend_stop
    done
}

# A function that is used through its group has a character device, too, and KVM takes that.
through_type1() {
    backend_start --no-snoop assume --iommu type1 --kvm-socket "$SHIM"
    vm_lifetime "$(wanted assume)" LD_PRELOAD=/usr/local/lib/libkvm_vfio_shim.so "KVM_VFIO_SHIM_SOCKET=$SHIM"
    backend_stop
    equal "$(wanted assume)" "$(statistic told)" "registrations that told KVM"
}

# own_tests PROGRAM: runs tests of frontend-shim. None may skip for lack of KVM.
own_tests() {
    SHIM_LIBRARY=/usr/local/shim/libkvm_vfio_shim.so "/usr/local/shim/deps/$1" --nocapture --test-threads 1 >/run/said 2>&1 || {
        tail -n 30 /run/said
        return 1
    }
    lacks 'not tested' /run/said
}

registered_before_map() {
    registered_only "$(wanted assume)"
    [ "$(wanted assume)" = 0 ] ||
        equal "$REGISTER" "$(grep -oE "$REGISTER|$MAPPED" "$TRACING/trace" | head -n 1)" "what came first"
    shim_status "policy=lock .* registered=1 told=$(wanted assume) kept=false"
}
executed() { [ "$(hits_since_mark "$WBINVD")" -gt 0 ]; }
written_back() {
    mark
    # A processor that goes offline executes WBINVD last.
    guest exec -- 'echo 0 >/sys/devices/system/cpu/cpu1/online'
    within 10 executed
    kernel_calls $(($(hits_since_mark "$WBINVD") * $(wanted assume))) "$WRITTEN_BACK"
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
# QEMU releases it after the guest has.
released() { ! guest qmp qom-get '{"path":"/machine/peripheral/own","property":"type"}'; }
plugged() {
    mark
    guest qmp device_add "{\"driver\":\"vfio-pci\",\"id\":\"own\",\"host\":\"$SECOND\",\"bus\":\"rp\"}"
    both_drives_work
    # KVM already knows, if it must.
    registered_only 0
}
unplugged() {
    mark
    own_drive_gone
    unregistered_only 0
    verify --size=8M
}

backend_killed() {
    mark
    kill -9 "$(cat "$BACKEND_PID")"
    within 30 test -s "$BACKEND_STATUS"
    # Less than 1 MiB: the guest's memory is no longer pinned.
    [ "$(pages_pinned)" -lt 256 ]
    # It binds the function, so no other process has it.
    iommu-probe >/dev/null
    guest exec -- true
    within 10 shim_status 'registered=0 '
}
kept() {
    backend_killed
    unregistered_only 0
    case $(wanted assume) in
    0) shim_status 'told=0 kept=false' ;;
    *) shim_status 'told=0 kept=true' ;;
    esac
}
backend_again() {
    backend_start --no-snoop assume --kvm-socket "$SHIM"
    within 20 logged 'region .* mapped'
    verify --size=8M
    shim_status "registered=1 told=$(wanted assume) kept=false"
}
registered_again() {
    mark
    backend_again
    registered_only 0
}
vm_killed() {
    mark
    guest kill
    within 10 logged 'front-end disconnected'
    within 10 unregistered_only "$(wanted assume)"
    within 10 nothing_more_pinned
    ! logged 'ERROR' >/dev/null
}
nothing_more_pinned() { equal "$(cat /run/pinned-serving)" "$(pages_pinned)" "pages pinned"; }

own_first() {
    mark
    export KVM_VFIO_SHIM_POLICY=dynamic
    shim_guest_start --qemu-arg -object --qemu-arg iommufd,id=iommufd --qemu-arg -device \
        --qemu-arg "vfio-pci,id=own,host=$SECOND,iommufd=iommufd,bus=rp"
    registered_only "$(wanted own)"
    kernel_calls 1 "$DEVICE_MADE"
    shim_status "policy=dynamic .* registered=1 told=$(wanted assume) kept=false"
    both_drives_work
}
unregistered_and_registered() {
    backend_killed
    unregistered_only "$(wanted assume)"
    mark
    backend_again
    registered_only "$(wanted assume)"
}

# A guest with the shim in its QEMU, and a port for a device that QEMU owns.
shim_guest_start() {
    guest_start --shim "$SHIM" --mem 256M --reconnect 500 --timeout 300 \
        --qemu-arg -device --qemu-arg pcie-root-port,id=rp,slot=1,chassis=1 "$@"
}

probe "$REGISTER" "$UNREGISTER" "$DEVICE_MADE" "$MAPPED" "$WBINVD" "$WRITTEN_BACK"
bind_to_vfio "$SECOND"

if [ "$PROFILE" = vtd ]; then
    for program in kvm_vfio_shim hooks qemu; do
        claim "the shim's own tests pass where there is KVM: $program" own_tests "$program"
    done
fi
claim "KVM is told as the profile says for each policy, with the shim and without" every_policy
claim "the same through type1, by a character device that is never bound" through_type1
# The rest runs on one profile where KVM is told and on one where it is not. The shim and KVM depend on nothing else of the
# IOMMU, and amd-iommu has the same answer as vtd-snoop, as the claim above has shown.
[ "$PROFILE" != amd-iommu ] || finished

backend_start --no-snoop assume --kvm-socket "$SHIM" || exit
pages_pinned >/run/pinned-serving
echo >$TRACING/trace
mark
shim_guest_start --smp 2 --qemu-arg -sandbox \
    --qemu-arg on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny || exit
claim "QEMU in its sandbox tells KVM before guest memory is mapped" registered_before_map
claim "a guest's WBINVD writes caches back if KVM was told, and only then" written_back
claim "the file passed to the shim gives no access to the device" no_rights
claim "a device that QEMU owns works beside the backend's" plugged
claim "and it can be unplugged while the backend's continues" unplugged
claim "a killed backend releases device and memory at once, and KVM's answer stays" kept
claim "the next backend registers, KVM's answer does not change, and data verify" registered_again
claim "a killed virtual machine is unregistered once, and its memory unpinned" vm_killed

if [ "$(wanted own)" -gt 0 ]; then
    claim "a virtual machine in which QEMU's own device comes first has one kvm-vfio device" own_first
    claim "when QEMU's own device is unplugged, KVM's answer follows the backend's" own_drive_gone
    claim "with policy dynamic KVM's answer follows every backend" unregistered_and_registered
    guest kill
fi
backend_stop
finished
