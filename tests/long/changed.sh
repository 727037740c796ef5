#!/bin/sh
# Moves a guest of stock QEMU to another QEMU 20 times under load while the backend stays, half of the times with split rings and half
# with packed ones. Run it by hand: tests/long/changed.sh [CHANGES]. scripts/test runs four (tests/outside/changed.sh).
set -eu

cd "$(dirname "$0")/../.."
cargo build --release --locked --workspace
CHANGES=$((${1:-20} / 2)) exec tests/outside/changed.sh
