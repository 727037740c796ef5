# Counts the instructions of a worker. scripts/bench sources this file.
# shellcheck shell=bash

# engine_instructions: instructions of a read in one worker, without those of the controller and of the driver, which are in the
# doorbell write of the bench.
engine_instructions() {
    local program work case chains depth workers reads=64000 file
    (cd "$ROOT" && cargo bench --locked -p vhost-device-vfio --bench engine --no-run)
    program=$(cd "$ROOT" && cargo bench --locked -p vhost-device-vfio --bench engine --no-run 2>&1 | sed -n 's/.*engine\.rs (\(.*\))$/\1/p')
    program=$(cd "$ROOT" && realpath "$program")
    work=$(mktemp -d)
    printf '| chains | in flight | workers | instructions a read | of which in |\n|---|---|---|---|---|\n'
    for case in 'indirect 1 1' 'indirect 32 1' 'linked 1 1' 'linked 32 1' 'indirect 32 2'; do
        read -r chains depth workers <<<"$case"
        valgrind --tool=callgrind --separate-threads=yes --callgrind-out-file="$work/$chains-$depth-$workers" \
            "$program" --count "$reads" "$chains" "$depth" "$workers" 2>"$work/log" || die "$(<"$work/log")"
        # The workers are the threads that have executed most.
        for file in "$work/$chains-$depth-$workers"-*; do echo "$(sed -n 's/^totals: //p' "$file") $file"; done | sort -n |
            tail -n "$workers" | while read -r _ file; do
            callgrind_annotate --auto=no --threshold=100 --show-percs=no "$file" |
                worker_functions "$reads" "| $chains | $depth | one of $workers |"
        done
    done
    rm -rf "$work"
}
# worker_functions READS PREFIX: sums what callgrind_annotate prints by function.
worker_functions() {
    awk -v reads="$1" -v prefix="$2" '
        $1 ~ /^[0-9,]+$/ && $2 ~ /:/ {
            if (/Doorbells/) next
            cost = $1; gsub(",", "", cost); sub(/ \[[^\]]*\]$/, "")
            n = split($0, part, ":"); sub(/{{closure}}/, "completed", part[n]); sum += cost; by[part[n]] += cost
        }
        END {
            printf "%s %.0f |", prefix, sum / reads
            for (name in by) if (by[name] / reads >= 5) printf "%s %s %.0f", found++ ? "," : "", name, by[name] / reads
            print " |"
        }'
}
