#!/bin/sh
# The oracle of dirty pages (tests/testbed/dirty_pages.rs) with a million requests: split and packed rings, linked and indirect
# descriptors, direct and bounced data. Run it by hand: tests/long/dirty_pages.sh [REQUESTS [SEED]]. scripts/test runs a tenth
# (tests/program/dirty_pages.rs).
set -eu

cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
cargo build --release --locked --workspace
cargo build --release --locked --package testbed --example dirty-pages
"$target/release/examples/dirty-pages" --requests "${1:-1000000}" --seed "${2:-$(date +%s)}"
