#!/bin/sh
# profiles: vtd
# minutes: 0.5
# boot: shim
# options: --add target/shim:/usr/local/shim
# A guest returns memory while a device can access it. Without the KVM shim the guest reads wrong data. With the shim the memory
# is kept.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

SHIM=/run/kvm.sock
MEMORY=$((256 << 20))

# A guest with a balloon, which reports its free pages as soon as it has started.
balloon_guest_start() {
    guest_start --mem 256M --reconnect 500 --timeout 300 "$@" \
        --qemu-arg -device --qemu-arg virtio-balloon-pci,id=balloon,free-page-reporting=on
}
# Bytes of guest memory that have pages.
memory_allocated() {
    for file in "/proc/$(guest pid)/fd"/*; do
        case $(readlink "$file") in
        /memfd:*) echo $((512 * $(stat -L -c %b "$file"))) && return ;;
        esac
    done
    return 1
}
holes() { [ "$(memory_allocated)" -lt "$MEMORY" ]; }
# A checksum of what the guest reads from the disk, through its page cache.
read_sum() { guest exec -- 'dd if=/dev/vda bs=1M count=16 2>/dev/null | md5sum | cut -d " " -f 1'; }

# Frees memory in the guest and waits until the guest has reported it and QEMU has answered.
report_free_pages() {
    guest exec -- '
        mount -t tracefs tracefs /sys/kernel/tracing && cd /sys/kernel/tracing || exit 11
        echo "r:reported virtballoon_free_page_report" >kprobe_events
        echo 1 >events/kprobes/reported/enable
        dd if=/dev/zero of=/tmp/freed bs=1M count=64 2>/dev/null && rm /tmp/freed
        n=0; until grep -q "reported *[1-9]" kprobe_profile; do [ $n -lt 300 ] || exit 12; n=$((n + 1)); usleep 100000; done'
}

alarm() {
    # When it was mapped, all of it had pages.
    logged 'region .* mapped'
    within 20 holes
    within 20 logged "$ALARM"
    equal 1 "$(times_logged "$ALARM")" alarms
}
corrupted() {
    found=$(read_sum)
    equal 32 "${#found}" "digits of the sum"
    [ "$found" != "$(cat /run/sum)" ] || {
        echo "the guest reads the data of the drive: the discard did no harm"
        return 1
    }
    guest exec -- '! dmesg | grep -i "i/o error"'
    guest kill
}
kept() {
    within 10 shim_status 'registered=1 told=0'
    report_free_pages
    inflate $((MEMORY - (64 << 20)))
    inflate "$MEMORY"
    equal "$MEMORY" "$(memory_allocated)" "bytes of guest memory with pages"
    equal 0 "$(times_logged "$ALARM")" alarms
}
shim_status() { /usr/local/shim/examples/ask "$SHIM" >/run/said && grep -E -e "$1" /run/said; }
verified() {
    equal "$(cat /run/sum)" "$(read_sum)" "what the guest reads"
    verify --size=16M
}
refused() {
    backend_stop
    backend_start --no-snoop assume --kvm-socket "$SHIM"
    within 20 logged 'the VM has been running for .* policy is .lock.'
    equal 0 "$(times_logged 'region .* mapped')" "regions mapped"
    shim_status 'registered=0 told=0 kept=false'
    backend_stop
}
as_before() {
    inflate $((MEMORY - (64 << 20)))
    within 20 holes
}

bind_to_nvme "$FUNCTION" || exit
dd if=/dev/urandom bs=1M count=16 2>/dev/null | tee "$(block_device "$FUNCTION")" | md5sum | cut -d ' ' -f 1 >/run/sum
sync
bind_to_vfio "$FUNCTION"

backend_start || exit
balloon_guest_start || exit
claim "without a shim, memory that is discarded while the device uses it raises one alarm" alarm
claim "and the guest then reads wrong data, without any error" corrupted
backend_stop

backend_start --kvm-socket "$SHIM" || exit
balloon_guest_start --shim "$SHIM" || exit
claim "with a shim, neither free page reporting nor a balloon discards a page" kept
claim "and data verify" verified
claim "once the guest has run, KVM's answer is locked, and a backend that would change it is refused" refused
claim "when no device can access guest memory any more, a balloon works again" as_before
guest kill
finished
