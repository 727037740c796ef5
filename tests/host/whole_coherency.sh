#!/bin/sh
# profiles: vtd vtd-snoop vtd-scalable amd-iommu virtio-iommu
# minutes: 0.6
# boot: iommu
# options: --qemu trixie-backports
# Coherency of a whole function: the verdict under each policy, registrations with KVM, the order of the calls to the kernel, and
# pins against the ledger. The virtual machines run only their firmware, which is enough to get their memory mapped.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

SHIM=/run/kvm.sock
REGISTER=kvm_arch_register_noncoherent_dma
UNREGISTER=kvm_arch_unregister_noncoherent_dma

# wanted POLICY: how many registrations KVM must get, from the profile. flushes POLICY: true if memory is flushed.
wanted() { sed -n "s/^kvm = .*\\b$1=\\([0-9]*\\).*/\\1/p" /testbed/profile; }
flushes() { sed -n "s/^verdict = $1 //p" /testbed/profile | grep -q '^not coherent'; }
kernel_calls() { equal "$1" "$(hits_since_mark "$2")" "times the kernel entered $2"; }

# firmware_only COMMAND…: starts QEMU with the function, through COMMAND.
firmware_only() {
    "$@" qemu-system-x86_64 -machine q35,memory-backend=ram -accel kvm -m 64M -nodefaults -no-user-config -display none \
        -object memory-backend-memfd,id=ram,size=64M,share=on -device "$(vfio_user_device drive)" \
        </dev/null >/run/firmware.log 2>&1 &
    vm=$!
    echo "$vm" >/run/vm.pid
}
with_shim() { firmware_only env LD_PRELOAD=/usr/local/lib/libkvm_vfio_shim.so "KVM_VFIO_SHIM_SOCKET=$SHIM"; }
# The firmware changes the memory map below 1 MiB several times; this is the last range that it adds.
booted() { within 30 logged 'DMA map 0xe8000\+32K'; }
vm_gone() { [ ! -s /run/vm.pid ] || [ ! -e "/proc/$(cat /run/vm.pid)/exe" ]; }
# clean_up: ends what a failed claim has left.
clean_up() {
    [ ! -s /run/drive.pid ] || kill -KILL "$(cat /run/drive.pid)" 2>/dev/null || true
    [ ! -s /run/holder.pid ] || kill -KILL "$(cat /run/holder.pid)" 2>/dev/null || true
    [ ! -s /run/vm.pid ] || kill -KILL "$(cat /run/vm.pid)" 2>/dev/null || true
    within 10 vm_gone
}
agree() { equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"; }
as_before() { equal "$(cat /run/pins)" "$(pages_pinned)" "pages pinned in this machine"; }

refused_without_shim() {
    for policy in suppress allow refuse assume; do
        if flushes "$policy"; then
            vhost-device-vfio --vfio-user --socket-path /run/no.sock --device "$FUNCTION" --no-snoop "$policy" \
                >/run/refused 2>&1 && return 1
            contains 'KVM cannot be told' /run/refused
        fi
    done
}
vm_lifetime() {
    clean_up
    pages_pinned >/run/pins
    serve_whole drive "$FUNCTION" --no-snoop "$1" --kvm-socket "$SHIM"
    mark
    with_shim
    booted
    within 10 agree
    kernel_calls "$(wanted "$1")" "$REGISTER"
    kernel_calls 0 "$UNREGISTER"
    kill -9 "$vm"
    within 15 logged 'front-end disconnected'
    nothing_pinned
    within 10 kernel_calls "$(wanted "$1")" "$UNREGISTER"
    backend_stop
    within 5 as_before
    for name in staged map_flushed_bytes unmap_flushed_bytes; do
        if flushes "$1"; then [ "$(statistic "$name")" -gt 0 ]; else equal 0 "$(statistic "$name")" "$name"; fi
    done
}
# A front-end that has received the device's own file keeps the function and the pins until it ends.
killed_trapped() {
    clean_up
    pages_pinned >/run/pins
    serve_whole drive "$FUNCTION" --no-snoop assume --kvm-socket "$SHIM" --bars trapped
    with_shim
    booted
    kill -KILL "$(cat "$BACKEND_PID")"
    within 10 as_before
    # QEMU may have ended by itself.
    kill -9 "$vm" 2>/dev/null || true
}
killed_direct() {
    clean_up
    pages_pinned >/run/pins
    serve_whole drive "$FUNCTION" --no-snoop assume --kvm-socket "$SHIM"
    with_shim
    booted
    kill -KILL "$(cat "$BACKEND_PID")"
    within 10 test -s "$BACKEND_STATUS"
    [ "$(pages_pinned)" -gt 16000 ]
    kill -9 "$vm"
    within 10 as_before
    # The function is free again: the next backend can bind it.
    serve_whole drive "$FUNCTION" --no-snoop assume --kvm-socket "$SHIM"
    backend_stop
}
# A process that the front-end has passed the device's file to, and which has detached the device, turned its MSI-X on and routed
# the host's request away. It outlives the front-end.
held_by_another() {
    clean_up
    pages_pinned >/run/pins
    serve_whole drive "$FUNCTION" --no-snoop assume --kvm-socket "$SHIM"
    with_shim
    booted
    vfio-rights "$vm" hold >/run/held 2>&1 &
    echo $! >/run/holder.pid
    within 10 test -s /run/held
    contains 'held ' /run/held
    kill -9 "$vm"
    within 15 logged 'front-end disconnected'
    within 10 logged "the device's own file, which was given to process $vm, is still open or mapped: .*vfio-rights"
    as_before
    with_shim
    within 20 contains 'Device or resource busy' /run/firmware.log
    within 10 vm_gone
    within 10 logged 'front-end disconnected'
    kill -KILL "$(cat /run/holder.pid)"
    within 10 logged 'acquired anew; nobody else has its file'
}
# The next front-end's guest reads the drive: DMA, and interrupts.
served_after_the_holder() {
    use_process drive
    guest start --mem 128M --smp 1 --timeout 300 --shim "$SHIM" --qemu-arg -device --qemu-arg "$(vfio_user_device drive)"
    guest exec --timeout 120 -- '
        n=0; until [ -b /dev/nvme0n1 ]; do [ $n -lt 300 ] || exit 1; n=$((n + 1)); usleep 100000; done
        count() { awk "/nvme0q1/ { print \$2 }" /proc/interrupts; }
        before=$(count); dd if=/dev/nvme0n1 of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null
        [ $(($(count) - before)) -ge 90 ]'
    guest kill
    within 15 logged_more_than 2 'front-end disconnected'
    within 10 nothing_pinned
    # The host's request is heard again.
    echo "$FUNCTION" >/sys/bus/pci/drivers/vfio-pci/unbind
    within 20 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status"
    logged 'the host wants the device back'
    bind_to_vfio "$FUNCTION"
    within 10 as_before
}
refused_without_registration() {
    flushes assume || return 0
    serve_whole drive "$FUNCTION" --no-snoop assume --kvm-socket "$SHIM"
    firmware_only env
    within 20 logged 'refused: the device can bypass the CPU caches, and KVM cannot be told'
    nothing_pinned
    within 20 contains 'Operation not permitted' /run/firmware.log
    kill -9 "$vm" 2>/dev/null || true
    backend_stop
}

# The backend logs to the kernel's trace, so that its flushes appear in order with the calls.
ordered() {
    clean_up
    {
        echo "p:pin iommufd_ioas_map_file iova=+32(+24(%di)):x64"
        echo "p:copy iommufd_ioas_copy iova=+24(+24(%di)):x64"
        echo "p:unmap iommufd_ioas_unmap iova=+8(+24(%di)):x64"
    } | while read -r entry; do echo "$entry" >>"$TRACING/kprobe_events"; done
    for entry in pin copy unmap; do echo 1 >"$TRACING/events/kprobes/$entry/enable"; done
    echo >"$TRACING/trace"
    RUST_LOG=info,vhost_device_vfio::iommu=trace vhost-device-vfio --vfio-user --socket-path /run/drive.sock \
        --device "$FUNCTION" --no-snoop assume --kvm-socket "$SHIM" 2>"$TRACING/trace_marker" &
    use_process drive
    echo $! >"$BACKEND_PID"
    BACKEND_LOG=$TRACING/trace
    within 20 logged 'serving '
    with_shim
    booted
    # The backend ends first: if the virtual machine were killed first, the end of its KVM and the unmaps would be concurrent.
    kill "$(cat "$BACKEND_PID")"
    within 10 logged 'statistics: '
    kill -9 "$vm" 2>/dev/null || true
    ! flushes assume || within 10 logged "$UNREGISTER: "
    for entry in pin copy unmap; do echo 0 >"$TRACING/events/kprobes/$entry/enable"; done
    sed -nE -e "s/.* ($REGISTER|$UNREGISTER): .*/\\1/p" -e 's/.* (pin|copy|unmap): .*/\1/p' \
        -e 's/.*TRACE.* (flush|flushed) 0x.*/\1/p' "$TRACING/trace" | sed "s/$REGISTER/register/; s/$UNREGISTER/unregister/" >/run/events
    if flushes assume; then
        equal 'register,pin,flush,flushed,copy,unmap' "$(head -n 6 /run/events | paste -s -d ,)" "what came first"
        equal 'copy,unmap,flush,flushed,unmap,unregister' "$(tail -n 6 /run/events | paste -s -d ,)" "what came last"
    else
        equal 'pin' "$(head -n 1 /run/events)" "what came first"
        equal 'unmap' "$(tail -n 1 /run/events)" "what came last"
    fi
}

probe "$REGISTER" "$UNREGISTER"
claim "a function that would need flushes is refused without a shim" refused_without_shim
for policy in suppress allow refuse assume; do
    claim "--no-snoop=$policy: KVM is told as the profile says, pins and ledger agree, all is unpinned at the end" \
        vm_lifetime $policy
done
# The rest runs on one profile where the function is flushed and on one where it is not. The claims above have shown the answers
# on the other profiles under every policy, and nothing else depends on the kind of IOMMU.
case $PROFILE in vtd | vtd-snoop) ;; *) finished ;; esac
claim "without a shim in QEMU the version is refused: QEMU gets an errno, the log has the reason" refused_without_registration
claim "killed with memory mapped and trapped BARs, the backend leaves nothing pinned" killed_trapped
claim "with direct BARs the front-end keeps function and pins until it ends" killed_direct
claim "whoever was passed the device's file keeps others out until it ends, and then the function is acquired anew" held_by_another
claim "the next front-end is then served with interrupts and DMA, and the host's request is heard" served_after_the_holder
claim "KVM is told, memory pinned, flushed and mapped, and all in reverse order at the end" ordered
finished
