#!/bin/sh
# 200 hand-overs in a row under load, natively, on split and packed rings. It takes half a minute after the build, prints how long
# requests waited, and ends at the first error; scripts/test runs 20 of them.
#   tests/long/hand_overs.sh [COUNT]
set -eu
cd "$(dirname "$0")/../.."
HAND_OVERS=${1:-200} exec cargo test --release --locked -p vhost-device-vfio --test program -- --nocapture \
    hand_over::twenty_hand_overs_in_a_row_leave_nothing_behind
