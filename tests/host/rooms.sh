#!/bin/sh
# profiles: vtd vtd-snoop debian debian-6.1
# minutes: 0.3
# boot: iommu
# options: --add target/live:/usr/local/bin/live
# The iommu and vfio modules on the real kernel: backend/tests/live.rs, through iommufd in both regimes, and through type1.
# Debian's own kernels have only the latter.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

export VDV_DEVICE="$FUNCTION"
live --list 2>/dev/null | sed -n 's/: test$//p' >/run/names
# run PATTERN REGIME
run() {
    grep -E "$1" /run/names >/run/chosen || claim "there are tests" false
    while read -r test; do
        claim "$(echo "$test" | sed 's/::/: /' | tr _ ' ')$2" env VDV_REGIME="${2#, }" live --exact "$test"
    done </run/chosen
}
# hand_over_space.sh has the tests of one module.
none_left_out() { ! grep -vE '^((second::|type1::)?[^:]*|hand_over::.*)$' /run/names; }
claim "no module of tests is left out" none_left_out
case $PROFILE in
debian*) ;;
*)
    run '^(second::)?[^:]*$' ', coherent'
    run '^(second::)?[^:]*$' ', flushing'
    ;;
esac
run '^type1::' ''
finished
