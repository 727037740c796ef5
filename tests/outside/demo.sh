#!/usr/bin/env bash
# minutes: 1
# scripts/demo, as a new user runs it.
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
# act WORD: the lines of one act.
act() { awk -v "act=Act $1" '/^Act / { mine = index($0, act) == 1 } mine' "$WORK/shown"; }
figures() {
    act two | grep -E '^[0-9]+ I/Os, [0-9]+ bytes, [0-9]+ bounce copies, [0-9]+ maps .* per request\), 0 errors$'
}
# Each act shows the checksum twice: from the guest and from outside.
same_sums() {
    local word
    for word in one two three; do
        equal 2 "$(act "$word" | grep -oE '\b[0-9a-f]{64}\b' | sort | uniq -c | awk '{ print $1 }')" "times the sum is shown in act $word"
    done
}
kvm_is_told() {
    equal 'before 0 0,meanwhile 1 0,afterwards 1 1' "$(act three |
        sed -n 's/.*KVM \([a-z]*\): non-coherent DMA registered \([0-9]*\) times, unregistered \([0-9]*\) times/\1 \2 \3/p' |
        paste -sd ,)"
}
readable() {
    [[ $(act one | wc -l) -le 25 && $(act two | wc -l) -le 60 && $(act three | wc -l) -le 25 ]]
}

claim "the demo succeeds" succeeds
claim "in each act the guest's checksum is the one found outside" same_sums
claim "the second act ends with its statistics" figures
claim "the third act shows KVM told of non-coherent DMA while the function is in use" kvm_is_told
claim "acts one and three show at most 25 lines, act two 60" readable
finished
