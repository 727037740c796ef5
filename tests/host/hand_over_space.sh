#!/bin/sh
# profiles: vtd vtd-snoop
# minutes: 0.6
# boot: iommu
# options: --add target/live:/usr/local/bin/live
# A drive passes from one process to another, and guest memory stays pinned: backend/tests/live/hand_over.rs, in both regimes.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

export VDV_DEVICE="$FUNCTION"
for regime in coherent flushing; do
    live --list hand_over:: 2>/dev/null | sed -n '/::\(predecessor\|successor\):/d; s/: test$//p' >/run/names
    while read -r test; do
        claim "$(echo "${test##*::}" | tr _ ' '), $regime regime" env VDV_REGIME="$regime" live --exact "$test"
    done </run/names
done
[ -s /run/names ] || claim "there are tests" false
finished
