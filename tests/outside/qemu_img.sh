#!/usr/bin/env bash
# minutes: 0.3
# QEMU's own block layer as the client of the emulated drive, through libblkio's virtio-blk-vhost-user, and nbdkit, through the
# same library. These clients share no code with this project.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

WORK=$(mktemp -d)
SOCKET=$WORK/disk.sock
PATH=${TESTBED_QEMU:+$TESTBED_QEMU/bin:}$PATH
IMAGE=driver=virtio-blk-vhost-user,path=$SOCKET,cache.direct=on

trap clean_up EXIT

# True if QEMU has the driver, even if it cannot connect to the socket.
knows_driver() { ! qemu-img info --image-opts "$IMAGE" 2>&1 | grep -q 'Unknown driver'; }

serves() { serve disk --device "emulated:file=$WORK/disk.img,create=on,size=64M" --queues 1; }
# io COMMAND…: runs the commands in one qemu-io.
io() {
    local command commands=()
    for command; do commands+=(-c "$command"); done
    qemu-io --image-opts "$IMAGE" "${commands[@]}" >"$WORK/said" 2>&1 || { cat "$WORK/said" && return 1; }
    # qemu-io exits with status 0 even if a pattern does not match.
    lacks 'verification failed' "$WORK/said" && lacks 'failed' "$WORK/said"
}
size_is_seen() { qemu-img info --image-opts "$IMAGE" | grep -q 'virtual size: 64 MiB'; }
patterns() {
    io 'write -P 0x5a 0 1M' 'write -P 0xa5 1M 64k' 'write -P 0x3c 8190k 4k' flush \
        'read -P 0x5a 0 1M' 'read -P 0xa5 1M 64k' 'read -P 0x3c 8190k 4k' 'read -P 0 2M 1M'
    equal 5a "$(dd if="$WORK/disk.img" bs=1 skip=1048575 count=1 status=none | od -An -tx1 | tr -d ' ')" "the file's byte"
}
zeroes_and_discards() {
    io 'write -P 0x77 16M 4M' 'write -z 16M 1M' 'discard 18M 1M' flush \
        'read -P 0 16M 1M' 'read -P 0x77 17M 1M' 'read -P 0 18M 1M' 'read -P 0x77 19M 1M'
}
many_at_once() {
    local commands=() n
    for n in {0..63}; do commands+=("aio_write -P $((n + 1)) $((n * 128))k 128k"); done
    commands+=(aio_flush)
    for n in {0..63}; do commands+=("read -P $((n + 1)) $((n * 128))k 128k"); done
    io "${commands[@]}"
}
image_round_trip() {
    head -c 8M /dev/urandom >"$WORK/image"
    qemu-img convert -n --target-image-opts -f raw "$WORK/image" "$IMAGE"
    qemu-img dd -f raw -O raw bs=1M count=8 "if=$WORK/disk.img" "of=$WORK/back"
    cmp "$WORK/image" "$WORK/back"
}
bench_runs() { qemu-img bench --image-opts -c 20000 -d 32 -s 4096 "$IMAGE"; }

# nbdkit and its plugin for libblkio. Debian 12 builds it without, so there it is the next Debian's, with the libraries of that
# Debian's QEMU.
prepare_nbdkit() {
    local dir=$TESTBED_CACHE/nbdkit
    NBDKIT=(nbdkit) PLUGIN=blkio
    [[ -n ${QEMU:-} ]] || { need nbdkit=nbdkit && return; }
    if [[ ! -x $dir/usr/bin/nbdkit ]]; then
        mkdir -p "$dir"
        apt_private qemu-trixie deb trixie
        (cd "$dir" && apt-get "${APT_PRIVATE[@]}" download nbdkit && dpkg-deb --extract nbdkit_*.deb . && rm nbdkit_*.deb)
    fi
    NBDKIT=("$QEMU/loader/qemu-img" --library-path "$QEMU/lib" --argv0 nbdkit "$dir/usr/bin/nbdkit")
    PLUGIN=$dir/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-blkio-plugin.so
}
nbdkit_serves() {
    "${NBDKIT[@]}" --foreground --unix "$WORK/nbd" "$PLUGIN" virtio-blk-vhost-user "path=$SOCKET" >"$WORK/nbdkit.log" 2>&1 &
    echo $! >"$WORK/nbdkit.pid"
    within 20 listens "$WORK/nbd" || { cat "$WORK/nbdkit.log" && return 1; }
    IMAGE=driver=nbd,server.type=unix,server.path=$WORK/nbd
    size_is_seen
    # The patterns need a zero there.
    io 'write -z 2M 1M'
    patterns
    zeroes_and_discards
    many_at_once
    kill "$(<"$WORK/nbdkit.pid")"
}
ends() {
    stop disk
    contains 'errors=0 ' "$WORK/disk.log"
    lacks 'discards=0 ' "$WORK/disk.log"
    lacks 'write_zeroes=0 ' "$WORK/disk.log"
}

if ! knows_driver; then
    # Debian 12 and its backports build QEMU without libblkio, so use the next Debian's QEMU there.
    case $(debian_codename) in
    bookworm) QEMU=$(scripts/testbed qemu trixie) && PATH=$QEMU/bin:$PATH ;;
    *) install_packages qemu-block-extra ;;
    esac
fi
prepare_nbdkit
claim "an emulated drive is served" serves
claim "qemu-img sees its size" size_is_seen
claim "patterns that qemu-io writes are read back, and are in the file" patterns
claim "zeroed and discarded blocks read as zero, and their neighbours are unchanged" zeroes_and_discards
claim "64 concurrent writes each go to the right place" many_at_once
claim "an image converted to the drive reads back the same" image_round_trip
claim "qemu-img bench succeeds" bench_runs
claim "nbdkit passes the same on, by NBD" nbdkit_serves
claim "the backend ends without errors" ends
finished
