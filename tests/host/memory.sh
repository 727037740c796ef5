#!/bin/sh
# profiles: vtd
# minutes: 0.8
# boot: load
# Kinds of guest memory: huge pages, above 4 GiB, plugged and unplugged while requests run.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

huge_pages() {
    guest_start --hugepages --mem 256M
    logged 'region .* pages 2M mapped'
    verify
    guest stop
    echo 0 >/proc/sys/vm/nr_hugepages
}
# 256M below 4 GiB, the rest above: two regions of one file.
above_4g() {
    guest_start --mem 768M --qemu-arg -machine --qemu-arg max-ram-below-4g=256M
    logged 'region 0x100000000\+512M .* mapped'
    verify
    guest stop
}
plugged() {
    guest_start --mem 512M --add stress --qemu-arg -m --qemu-arg 512M,slots=2,maxmem=4G
    stress_start 600
    stress_lines >/run/lines
    before=$(times_logged 'region .* mapped in')
    guest qmp object-add '{"qom-type":"memory-backend-memfd","id":"m1","size":268435456,"share":true}'
    guest qmp device_add '{"driver":"pc-dimm","id":"dimm","memdev":"m1"}'
    within 40 logged 'region 0x100000000\+256M .* mapped'
    equal $((before + 1)) "$(times_logged 'region .* mapped in')" "regions mapped so far"
    stress_progresses
    longest_gap "$(cat /run/lines)" >/run/gap-plugged
}
unplugged() {
    stress_lines >/run/lines
    before=$(pinned)
    # The guest must have onlined the memory before it can release it.
    sleep 3
    guest qmp device_del '{"id":"dimm"}'
    within 60 logged 'region 0x100000000\+256M unmapped'
    equal $((before - 262144)) "$(pinned)" "kB pinned"
    stress_progresses
    longest_gap "$(cat /run/lines)" >/run/gap-unplugged
}
still_right() {
    stress_stop
    stress_result
    equal 0 "$(times_logged 'region 0x0\+512M unmapped')" "times the rest of memory was unmapped"
}

backend_start || exit
claim "2 MiB pages are mapped as 2 MiB pages, and data verify" huge_pages
claim "memory above 4 GiB is a region of its own, and data verify" above_4g
claim "a DIMM plugged under load is mapped alone" plugged
claim "a DIMM unplugged under load is unmapped alone" unplugged
claim "the workload that ran meanwhile found no wrong byte" still_right
echo "# longest time without a completed request: $(cat /run/gap-plugged) ms while the DIMM was plugged," \
    "$(cat /run/gap-unplugged) ms while it was unplugged"
guest stop
backend_stop
finished
