#!/bin/sh
# profiles: vtd vtd-snoop
# minutes: 0.3
# boot: iommu
# options: --add target/live:/usr/local/bin/live
# The iommu and vfio modules on the real kernel, in both regimes: backend/tests/live.rs.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

export VDV_DEVICE="$FUNCTION"
for regime in coherent flushing; do
    live --list --skip hand_over:: 2>/dev/null | sed -n 's/: test$//p' >/run/names
    while read -r test; do
        claim "$(echo "$test" | tr _ ' '), $regime regime" env VDV_REGIME="$regime" live --exact "$test"
    done </run/names
done
[ -s /run/names ] || claim "there are tests" false
finished
