#!/bin/sh
# Saves a guest of stock QEMU to a file 20 times under load, half of the times with split rings and half with packed ones, and
# goes on with it in another QEMU. Run it by hand: tests/long/saved.sh [SAVES]. scripts/test runs four (tests/outside/saved.sh).
set -eu

cd "$(dirname "$0")/../.."
cargo build --release --locked --workspace
SAVES=$((${1:-20} / 2)) exec tests/outside/saved.sh
