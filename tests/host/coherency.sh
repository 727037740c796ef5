#!/bin/sh
# profiles: vtd vtd-snoop vtd-scalable amd-iommu virtio-iommu
# minutes: 0.3
# boot: iommu
# The verdict on every kind of IOMMU under every policy, the calls and flushes that follow from it and their order, and the
# reports on it. The profile lists the verdicts.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

TRACE=/sys/kernel/tracing
# Guest address of the client's only region.
REGION=0x100000

expected() { sed -n "s/^verdict = $1 //p" /testbed/profile; }
flushes() { expected "$1" | grep -q '^not coherent'; }

# Starts and stops a front-end that has guest memory and sends requests.
client_start() {
    load "$SOCKET" --seconds 300 >/dev/null 2>&1 &
    echo $! >/run/client.pid
    within 10 logged "region $REGION.* mapped in"
}
client_stop() {
    kill "$(cat /run/client.pid)"
    within 10 logged "region $REGION.* unmapped"
}

agree() { equal "$(ledger)" "$(pinned)" "kB pinned, by the ledger and by the kernel"; }
as_before() { equal "$(cat /run/pins)" "$(pages_pinned)" "pages pinned in this machine"; }

served() {
    # A failed claim may have left a backend.
    [ ! -s "$BACKEND_PID" ] || kill -KILL "$(cat "$BACKEND_PID")" 2>/dev/null || true
    pages_pinned >/run/pins
    backend_start --no-snoop "$1"
    logged "DMA is $(expected "$1")$"
    agree
    before=$(pinned)
    client_start
    agree
    [ "$(pinned)" -gt "$before" ]
    # Let it send some requests.
    sleep 0.3
    client_stop
    agree
    equal "$before" "$(pinned)" "kB pinned once the front-end has gone"
    backend_stop
    within 5 as_before
    [ "$(statistic reads)" -gt 0 ]
    for name in flushed_bytes flush_us staged map_flushed_bytes unmap_flushed_bytes; do
        if flushes "$1"; then
            [ "$(statistic "$name")" -gt 0 ]
        else
            equal 0 "$(statistic "$name")" "$name"
        fi
    done
}
killed() {
    pages_pinned >/run/pins
    backend_start --no-snoop assume
    client_start
    kill -KILL "$(cat "$BACKEND_PID")"
    within 10 as_before
    backend_start
    vhost-device-vfio inspect "$FUNCTION" >/run/report
    backend_stop
    contains "in use by process" /run/report
}

# The backend logs to the kernel's trace, so that its flushes appear in order with the calls.
probe() { echo "p:$1 $2 $3" >>"$TRACE/kprobe_events"; }
traced() {
    # Fields of the structures in include/uapi/linux/iommufd.h, at which the fourth member of struct iommufd_ucmd points.
    probe pin iommufd_ioas_map_file 'ioas=+8(+24(%di)):u32 iova=+32(+24(%di)):x64'
    probe copy iommufd_ioas_copy 'from=+12(+24(%di)):u32 to=+8(+24(%di)):u32 iova=+24(+24(%di)):x64'
    probe unmap iommufd_ioas_unmap 'ioas=+4(+24(%di)):u32 iova=+8(+24(%di)):x64'
    echo 1 >"$TRACE/events/kprobes/enable"
    RUST_LOG=info,vhost_device_vfio::iommu=trace \
        vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" --no-snoop assume 2>"$TRACE/trace_marker" &
    echo $! >"$BACKEND_PID"
    BACKEND_LOG=$TRACE/trace
    within 20 logged 'serving '
    client_start
    client_stop
    kill "$(cat "$BACKEND_PID")"
    # The next one needs the function.
    wait "$(cat "$BACKEND_PID")"
    echo 0 >"$TRACE/events/kprobes/enable"
    sed -nE -e "s/.* (pin|copy|unmap): .*\) (.*) iova=$REGION\$/\1 \2/p" \
        -e "s/.*TRACE.* (flush|flushed) $REGION\+.*/\1/p" "$TRACE/trace" >/run/events
}
# in_order WANTED: what was done to the region, with the two address spaces named "live" and "staging".
in_order() {
    live=$(sed -n 's/.* to=//p' /run/events | head -n 1)
    [ -n "$live" ] || live=$(sed -n 's/^pin ioas=//p' /run/events)
    found=$(sed -E "s/\b(ioas|from|to)=$live\b/\1=live/g; s/\b(ioas|from|to)=[0-9]+/\1=staging/g" /run/events | paste -s -d ,)
    equal "$1" "$found" "what was done to the region"
}
ordered() {
    traced
    if flushes assume; then
        in_order "pin ioas=staging,flush,flushed,copy from=staging to=live,unmap ioas=staging,\
copy from=live to=staging,unmap ioas=live,flush,flushed,unmap ioas=staging"
    else
        in_order 'pin ioas=live,unmap ioas=live'
    fi
}

# Through type1 the kernel gives the same answers. There memory is not staged.
served_through_type1() {
    backend_start --no-snoop assume --iommu type1
    logged "$FUNCTION: through VFIO type1, as --iommu=type1 says"
    logged "DMA is $(expected assume)$"
    agree
    client_start
    agree
    sleep 0.3
    client_stop
    agree
    backend_stop
    [ "$(statistic reads)" -gt 0 ]
    equal 0 "$(statistic staged)" staged
    ! flushes assume || [ "$(statistic map_flushed_bytes)" -gt 0 ]
}
# The platforms that do not isolate interrupts are those whose kernel is told to accept that.
unsafe_interrupts() {
    grep -q vfio_iommu_type1.allow_unsafe_interrupts /testbed/profile || return 0
    echo N >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
    timeout 30 vhost-device-vfio --socket-path "$SOCKET" --device "$FUNCTION" --iommu type1 2>/run/answer || true
    echo Y >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
    contains 'does not isolate interrupts (no interrupt remapping). If every guest is trusted, boot with vfio_iommu_type1.allow' \
        /run/answer
}

inspected() {
    vhost-device-vfio inspect "$FUNCTION" >/run/report
    word=no
    ! grep -q '^answer = dma_cc=1' /testbed/profile || word=yes
    grep -q "^  snoop-enforced  $word\$" /run/report
    contains 'from VFIO_CHECK_EXTENSION(VFIO_DMA_CC_IOMMU)' /run/report
    contains 'No Snoop never set (the bit is hardwired to 0)' /run/report
    grep -q "^  as vhost-user-blk *$(expected suppress)\$" /run/report
}
inspected_as_json() {
    for policy in suppress allow refuse assume; do
        vhost-device-vfio inspect --json --no-snoop "$policy" "$FUNCTION" >/run/report
        contains "{\"schema\":1,\"function\":\"$FUNCTION\",\"class\":\"0x010802\",\"driver\":\"vfio-pci\"," /run/report
        contains '"no_snoop":"never-set"' /run/report
        grep -q "\"vhost_user_blk\":{\"serves\":true,\"verdict\":\"[a-z]*\",\"reason\":\"$(expected "$policy")\"}" /run/report
    done
}
listed() {
    vhost-device-vfio list --json >/run/report
    grep -q "{\"function\":\"$FUNCTION\",\"class\":\"0x010802\",\"driver\":\"vfio-pci\",\"iommu_group\":[0-9]*,.*\"verdict\":\"coherent\"}" /run/report
    vhost-device-vfio list >/run/report
    grep -q "^$FUNCTION  0x010802  vfio-pci *group [0-9]* *[^ -][^ ]* *coherent (iommufd)\$" /run/report
}

for policy in suppress allow refuse assume; do
    claim "--no-snoop=$policy: $(expected $policy); pins and ledger agree" served $policy
done
claim "killed with memory mapped, it leaves nothing pinned; inspect names the next one" killed
claim "calls to the kernel and cache flushes are in the designed order" ordered
claim "through type1 the verdict is the same, and nothing is staged" served_through_type1
claim "through type1, interrupts that are not isolated: the parameter" unsafe_interrupts
claim "inspect shows the facts with their sources, and the verdict" inspected
claim "inspect --json shows the same under every policy" inspected_as_json
claim "list shows the verdict in one word" listed
finished
