#!/bin/sh
# Kills the backend a thousand times under load and restarts it, half of the times with split rings and half with packed ones.
# Run it by hand: tests/long/kills.sh [KILLS [SEED]]. It takes one to three minutes after the build; the disk is in /dev/shm.
# scripts/test runs a short form (tests/program/kills.rs). Each line that it prints is a run without anything lost, doubled or
# reordered; it ends at the first error, which names the seed.
set -eu

cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
kills=${1:-1000}
seed=${2:-$(date +%s)}
cargo build --release --locked --workspace
cargo build --release --locked --package testbed --example kills

# Four kinds of rings of each layout, because each has its own way to take requests and to call.
for layout in '' --packed; do
    for kind in '' --linked --no-event-idx '--linked --no-event-idx'; do
        echo "# ${layout:---split} $kind"
        # shellcheck disable=SC2086 # split into words
        "$target/release/examples/kills" --count $((kills / 8)) --queues 2 --depth 32 --seed "$seed" $layout $kind
    done
done
