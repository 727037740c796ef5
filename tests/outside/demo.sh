#!/usr/bin/env bash
# scripts/demo, as a stranger types it.
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/testbed/claims.sh
. tests/testbed/claims.sh

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export TMPDIR=$WORK

scripts/demo >"$WORK/shown" 2>"$WORK/progress"
STATUS=$?

succeeds() {
    cat "$WORK/progress"
    equal 0 "$STATUS" "exit status"
    equal 'demo: ok' "$(tail -n 1 "$WORK/shown")" "last line"
}
figures() {
    tail -n 2 "$WORK/shown" | grep -E '^[0-9]+ I/Os, [0-9]+ bytes, [0-9]+ bounce copies, [0-9]+ maps .* per request\), 0 errors$'
}
same_sum() {
    equal 2 "$(grep -cF -e "$(sed -n 's/^ *\([0-9a-f]\{64\}\)  .file .*/\1/p' "$WORK/shown")" "$WORK/shown")" "lines with the sum"
}
readable() { [[ $(wc -l <"$WORK/shown") -le 60 ]]; }

claim "the demo runs to its end" succeeds
claim "the checksum that the guest found is found in the drive's image" same_sum
claim "it ends with its figures" figures
claim "it shows at most 60 lines" readable
finished
