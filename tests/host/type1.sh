#!/bin/sh
# profiles: debian debian-6.1
# minutes: 0.6
# boot: iommu
# options: --qemu-arg -drive --qemu-arg if=none,id=own,format=raw,file.driver=null-co,file.size=64M --qemu-arg -device --qemu-arg edu,addr=7,multifunction=on --qemu-arg -device --qemu-arg nvme,serial=own,drive=own,addr=7.1
# Debian's own kernels, which have no iommufd: a guest's drive through a group and a container, events in its life, the order of
# map and flush, and the messages for what is missing.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

AT=/sys/bus/pci/devices/$FUNCTION
GROUP=/dev/vfio/$(basename "$(readlink "$AT/iommu_group")")
# A function whose group has another one, which the kernel's nvme driver holds.
SHARED=0000:00:07.0
# Guest address of the client's only region.
REGION=0x100000
HANDOVER=/run/handover.sock

as_before() { equal "$(cat /run/pins)" "$(pages_pinned)" "pages pinned in this machine"; }
# refused PATTERN [ARGUMENT…]: the program ends with a message that matches.
refused() {
    pattern=$1
    shift
    if timeout 30 vhost-device-vfio --socket-path /run/other.sock --device "$FUNCTION" "$@" >/run/answer 2>&1; then return 1; fi
    grep -qE -e "$pattern" /run/answer || {
        echo "wanted: $pattern; found:"
        cat /run/answer
        return 1
    }
}

named() {
    grep -q "^$FUNCTION .* coherent (type1)\$" /run/listed
    contains '"interface":"type1","snoop_enforced":false,"iommu":"Intel VT-d, ECAP.SC=0"' /run/inspected
    logged "$FUNCTION: through VFIO type1, because iommufd cannot be used: .*CONFIG_VFIO_DEVICE_CDEV"
    logged "$FUNCTION: snooping not enforced \(type1, VFIO_DMA_CC_IOMMU; Intel VT-d, ECAP.SC=0\)"
}
serves_a_guest() {
    guest_start --queues 2 --smp 2 --mem 96M
    verify --size=16M
    equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"
}
reads_well() { guest exec --timeout 60 -- 'dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null'; }
# The successor ends, and the guest's drive goes on.
not_handed_over() {
    timeout 60 vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" --queues 2 --takeover "$HANDOVER" \
        >/run/answer 2>&1 && return 1
    contains 'with VFIO type1 memory stays pinned only as long as this process lives' /run/answer
    logged 'not handed over to process .*: .*with VFIO type1 memory stays pinned only .*; going on'
    reads_well
    equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"
}
pattern() { guest exec -- 'dd if=/dev/vda bs=64k skip=2048 count=16 iflag=direct 2>/dev/null | sha256sum'; }
load_in_background() {
    guest exec -- '(while [ ! -e /tmp/enough ]; do dd if=/dev/vda of=/dev/null bs=64k count=2000 iflag=direct; sleep 0.1; done) \
        >/dev/null 2>&1 & sleep 1'
}
taken_and_returned() {
    guest exec -- 'dd if=/dev/urandom of=/dev/vda bs=64k seek=2048 count=16 oflag=direct 2>/dev/null'
    pattern >/run/pattern
    pinned >/run/held
    load_in_background
    timeout 15 sh -c "echo $FUNCTION >$AT/driver/unbind"
    logged 'the host wants the device back'
    equal 0 "$(pinned)" "kB pinned while the drive is away"
    as_before
    bind_to_vfio "$FUNCTION"
    within 30 logged 'the device is back'
    guest exec -- 'touch /tmp/enough; sleep 1'
    equal "$(cat /run/pattern)" "$(pattern)" "data"
    equal "$(cat /run/held)" "$(pinned)" "kB pinned"
}
killed() {
    load_in_background
    kill -KILL "$(cat "$BACKEND_PID")"
    within 10 as_before
    guest kill
    backend_start
    refused "in use by process $(cat "$BACKEND_PID") \(vhost-device"
    backend_stop
}

# Every ioctl on a container enters the kernel here. The numbers are VFIO_IOMMU_MAP_DMA and VFIO_IOMMU_UNMAP_DMA; the addresses
# are fields of their structures.
ordered() {
    echo 'p:container vfio_fops_unl_ioctl number=%si:x32 map=+u16(%dx):x64 unmap=+u8(%dx):x64' >"$TRACING/kprobe_events"
    echo 1 >"$TRACING/events/kprobes/enable"
    RUST_LOG=info,vhost_device_vfio::iommu=trace \
        vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" --no-snoop assume 2>"$TRACING/trace_marker" &
    echo $! >"$BACKEND_PID"
    BACKEND_LOG=$TRACING/trace
    within 20 logged 'serving '
    logged 'KVM cannot be told of its DMA'
    load "$SOCKET" --seconds 300 >/dev/null 2>&1 &
    client=$!
    within 10 logged "region $REGION.* mapped in"
    sleep 0.3
    kill "$client"
    within 10 logged "region $REGION.* unmapped"
    kill "$(cat "$BACKEND_PID")"
    # The next claim needs the function.
    wait "$(cat "$BACKEND_PID")"
    logged 'statistics: '
    echo 0 >"$TRACING/events/kprobes/enable"
    sed -nE -e "s/.* number=0x3b71 map=$REGION .*/map/p" -e "s/.* number=0x3b72 .* unmap=$REGION\$/unmap/p" \
        -e "s/.*TRACE.* (flush|flushed) $REGION\+.*/\1/p" -e "s/.*(region) $REGION.* mapped in.*/published/p" \
        "$TRACING/trace" >/run/events
    equal map,flush,flushed,published,flush,flushed,unmap "$(paste -s -d , /run/events)" "what was done to the region"
    grep -q ' staged=0 map_flushed_bytes=[1-9][0-9]* unmap_flushed_bytes=[1-9]' "$TRACING/trace"
    grep -q ' flushed_bytes=[1-9]' "$TRACING/trace"
}
whole_refused() {
    refused 'refused: .* with VFIO type1 memory cannot be flushed before the guest could aim' --vfio-user --no-snoop assume
    serve_whole drive "$FUNCTION"
    logged 'DMA is coherent: the device never sets No Snoop'
    backend_stop
}

# Whoever has the group's file can open the device anew. It cannot leave the container while the owner has the device open, and it
# keeps everything pinned when the owner has died.
group_file_gives_the_device() {
    pages_pinned >/run/pins
    backend_start
    vfio-rights "$(cat "$BACKEND_PID")" >/run/rights
    contains "$GROUP device=done read=done mmap=done unset=16" /run/rights
    vfio-rights "$(cat "$BACKEND_PID")" hold-group >/run/held 2>&1 &
    holder=$!
    within 10 contains 'held ' /run/held
    kill -KILL "$(cat "$BACKEND_PID")"
    within 10 test -s "$BACKEND_STATUS"
    status=0
    refused "in use by process $holder \(vfio-rights\)" || status=$?
    as_before && status=1
    kill -KILL "$holder"
    within 10 as_before
    return "$status"
}

no_iommufd() { refused 'it has no character device; .*CONFIG_VFIO_DEVICE_CDEV' --iommu iommufd; }
not_viable() {
    bind_to_vfio "$SHARED"
    FUNCTION=$SHARED refused 'IOMMU group [0-9]+ is not viable: 0000:00:07.1 \(nvme\) must be bound to vfio-pci'
}
not_loaded() {
    rmmod vfio_iommu_type1
    status=0
    refused '/dev/vfio/vfio: .*load its module: modprobe vfio_iommu_type1' || status=$?
    insmod /testbed/modules/vfio_iommu_type1.ko
    return "$status"
}
as_nobody() {
    mkdir -p /run/nobody && chown 65534 /run/nobody
    grep -q nobody /etc/passwd || echo 'nobody:x:65534:65534::/run/nobody:/bin/sh' >>/etc/passwd
    su nobody -c "ulimit -l 64; PATH=$PATH LD_LIBRARY_PATH=$LD_LIBRARY_PATH timeout 30 vhost-device-vfio \
        --socket-path /run/nobody/s --device $FUNCTION" >/run/answer 2>&1 || true
    grep -qE -e "$1" /run/answer || { cat /run/answer && return 1; }
}
no_access() { as_nobody "$GROUP: Permission denied.*SUBSYSTEM==\"vfio\""; }
no_lockable_memory() {
    chmod 666 "$GROUP"
    status=0
    as_nobody 'KiB must be locked, RLIMIT_MEMLOCK allows 64 KiB for this process; raise it .ulimit -l' || status=$?
    chmod 600 "$GROUP"
    return "$status"
}
limited() {
    limit=/sys/module/vfio_iommu_type1/parameters/dma_entry_limit
    before=$(cat "$limit")
    echo 3 >"$limit"
    status=0
    refused 'needs 1 mappings, the kernel allows 0 more .*vfio_iommu_type1.dma_entry_limit' || status=$?
    echo "$before" >"$limit"
    return "$status"
}

vhost-device-vfio list >/run/listed
vhost-device-vfio inspect --json "$FUNCTION" >/run/inspected
pages_pinned >/run/pins
backend_start --queues 2 --handover-socket "$HANDOVER" || exit
claim "list, inspect and the log name the interface, and why it is used" named
claim "a guest's verifying workload finds no wrong byte" serves_a_guest
claim "a new process does not get the drive, both logs say why, and the guest goes on" not_handed_over
claim "a drive that the host takes under load is released at once, and comes back with its data and memory" taken_and_returned
claim "killed under load it leaves nothing pinned, and the next one is named as the owner" killed
claim "memory is mapped, flushed and then used, and flushed before it is unmapped" ordered
claim "a whole function is refused under a flushing verdict, with the reason, and served under a coherent one" whole_refused
claim "the file of a group gives its holder the device, and keeps memory pinned" group_file_gives_the_device
claim "--iommu iommufd: the option that this kernel lacks" no_iommufd
claim "a group that is not viable: the other function, with its driver" not_viable
claim "no access to the group: the file, and a udev rule" no_access
claim "too little lockable memory: how much is needed, how much is allowed, the fix" no_lockable_memory
claim "too few mappings allowed: the parameter" limited
claim "no IOMMU type 1: its module" not_loaded
finished
