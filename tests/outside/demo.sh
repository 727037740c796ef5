#!/usr/bin/env bash
# minutes: 2.5
# scripts/demo, as a new user runs it.
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

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
    for word in two three; do
        act "$word" | grep -E '^[0-9]+ I/Os, [0-9]+ bytes, [0-9]+ bounce copies, [0-9]+ maps .* per request\), 0 errors$'
    done
}
# Each act shows the checksum twice: from the guest and from outside.
same_sums() {
    local word
    for word in one two three four; do
        equal 2 "$(act "$word" | grep -oE '\b[0-9a-f]{64}\b' | sort | uniq -c | awk '{ print $1 }')" "times the sum is shown in act $word"
    done
}
kvm_is_told() {
    equal 'before 0 0,meanwhile 1 0,afterwards 1 1' "$(act four |
        sed -n 's/.*KVM \([a-z]*\): non-coherent DMA registered \([0-9]*\) times, unregistered \([0-9]*\) times/\1 \2 \3/p' |
        paste -sd ,)"
}
readable() {
    [[ $(act one | wc -l) -le 25 && $(act two | wc -l) -le 25 && $(act three | wc -l) -le 60 &&
        $(act four | wc -l) -le 25 ]]
}

claim "the demo succeeds" succeeds
claim "in each act the guest's checksum is the one found outside" same_sums
through_type1() { act two | grep -q "through VFIO type1"; }
claim "the second act goes through VFIO type1, on Debian's own kernel" through_type1
claim "the second and third act end with their statistics" figures
claim "the fourth act shows KVM told of non-coherent DMA while the function is in use" kvm_is_told
claim "act three shows at most 60 lines, the others 25" readable
finished
