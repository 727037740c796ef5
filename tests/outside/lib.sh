# shellcheck shell=bash
# For tests with whole programs on this machine: the functions of the testbed, the programs of this checkout, their start and their
# end. Sourced by tests/outside/*.sh and tests/long/compared.sh in the root of the checkout. WORK is the directory of a test.

TESTBED_ROOT=$PWD
TESTBED_DIR=$TESTBED_ROOT/tests/testbed
# shellcheck source=tests/testbed/lib.sh
. "$TESTBED_DIR/lib.sh"
# shellcheck source=tests/testbed/kernel.sh
. "$TESTBED_DIR/kernel.sh"
# shellcheck source=tests/testbed/image.sh
. "$TESTBED_DIR/image.sh"
# shellcheck source=tests/testbed/claims.sh
. "$TESTBED_DIR/claims.sh"

# shellcheck disable=SC2034 # used by the scripts that source this
TARGET=${CARGO_TARGET_DIR:-$TESTBED_ROOT/target}
RELEASE=$TARGET/release
BACKEND=$RELEASE/vhost-device-vfio
PATH=$RELEASE:$PATH

# shellcheck disable=SC2153 # WORK is the test's
# clean_up: removes WORK, after the processes whose IDs are in these files there have been killed.
clean_up() {
    local file
    for file in "$WORK"/*.pid "$WORK"/guest-*/pid; do
        [[ ! -s $file ]] || kill -9 "$(<"$file")" 2>/dev/null
    done
    rm -rf --one-file-system "$WORK"
}

# serve NAME ARGUMENT…: starts the backend, and waits for its socket. It has NAME.sock, NAME.log, and NAME.pid with its process.
serve() {
    local name=$1
    shift
    "$BACKEND" --socket-path "$WORK/$name.sock" "$@" </dev/null >>"$WORK/$name.log" 2>&1 &
    echo $! >"$WORK/$name.pid"
    within 20 listens "$WORK/$name.sock"
}
# stop NAME: ends it, and waits until it is gone.
stop() {
    kill -TERM "$(<"$WORK/$1.pid")"
    within 20 test ! -S "$WORK/$1.sock"
    within 20 grep -q 'statistics: ' "$WORK/$1.log"
    rm "$WORK/$1.pid"
}
