#!/bin/sh
# Saves a guest of stock QEMU to a file 20 times under load on a disk with split rings and on one with packed rings, and goes on with
# it in another QEMU. Run it by hand: tests/long/saved.sh [SAVES]. scripts/test saves it twice (tests/outside/saved.sh).
set -eu

cd "$(dirname "$0")/../.."
cargo build --release --locked --workspace
SAVES=${1:-20} exec tests/outside/saved.sh
