#!/bin/sh
# profiles: vtd
# minutes: 0.4
# boot: plain
# Everything is flushed. A DIMM is plugged and unplugged while a workload verifies every byte it reads.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

plugged() {
    guest qmp object-add '{"qom-type":"memory-backend-memfd","id":"m1","size":268435456,"share":true}'
    guest qmp device_add '{"driver":"pc-dimm","id":"dimm","memdev":"m1"}'
    within 40 logged 'region 0x100000000\+256M .* mapped in'
}
unplugged() {
    before=$(pinned)
    # The guest must have onlined the memory before it can release it.
    sleep 3
    guest qmp device_del '{"id":"dimm"}'
    within 60 logged 'region 0x100000000\+256M unmapped'
    equal $((before - 262144)) "$(pinned)" "kB pinned"
}
# The longest time that a request took while memory was plugged and unplugged, with flushes, in a machine emulated on one
# processor.
longest_stall() { guest exec -- "sed -n 's/.* lat (\([a-z]*\)): .*max= *\([0-9.]*k*\),.*/\2 \1/p' /tmp/fio.log" | sort -n | tail -n 1; }
still_right() {
    verify_result
    equal 0 "$(times_logged 'region 0x0\+512M unmapped')" "times the rest of memory was unmapped"
    longest_stall >/run/stall
    [ -s /run/stall ]
}
flushed() {
    guest stop
    backend_stop
    [ "$(statistic map_flushed_bytes)" -ge 805306368 ]
    [ "$(statistic unmap_flushed_bytes)" -ge 805306368 ]
    [ "$(statistic flushed_bytes)" -ge "$(statistic bytes_written)" ]
    equal 0 "$(statistic errors)" "requests failed"
}

backend_start --no-snoop assume || exit
guest_start --mem 512M --qemu-arg -m --qemu-arg 512M,slots=2,maxmem=4G
verify_start --size=96M
claim "a DIMM plugged under load is flushed before it is mapped" plugged
claim "a DIMM unplugged under load is flushed before it is unpinned" unplugged
claim "the workload that ran meanwhile found no wrong byte" still_right
echo "# longest time of a request meanwhile: $(cat /run/stall)"
claim "all of memory was flushed at map and at unmap, and every request's data around it" flushed
finished
