#!/usr/bin/env bash
# minutes: 1
# The Debian package in a root directory of its own, which Debian's installer has made: installed, used and removed. Needs root.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

WORK=$(mktemp -d)
ROOT=$WORK/root
VERSION=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
PACKAGE=$WORK/package/vhost-device-vfio_${VERSION}_$(dpkg --print-architecture).deb
trap clean_up EXIT

inside() { chroot "$ROOT" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
# What dpkg and its triggers write is not the package's.
files() { (cd "$ROOT" && find . -xdev -not -path './var/*' -not -path './run/*' -not -path './etc/*-' | sort); }

built() {
    scripts/package "$WORK/package" >"$WORK/log" 2>&1 || { tail -n 20 "$WORK/log" && return 1; }
    equal "$PACKAGE" "$(tail -n 1 "$WORK/log")" "path of the package"
    dpkg-deb --contents "$PACKAGE" >"$WORK/contents"
    equal '' "$(awk '$2 != "root/root"' "$WORK/contents")" "files that do not belong to root"
}
same_twice() {
    scripts/package "$WORK/again" >"$WORK/log" 2>&1 || { tail -n 20 "$WORK/log" && return 1; }
    cmp "$PACKAGE" "$WORK/again/${PACKAGE##*/}"
}
root_made() {
    local suite archive
    suite=$(debian_codename)
    archive=$TESTBED_CACHE/root-$suite.tar
    if [[ ! -e $archive ]]; then
        debootstrap --variant=minbase --include=systemd "$suite" "$ROOT" "$(debian_mirror)" >"$WORK/log" 2>&1 ||
            { tail -n 20 "$WORK/log" && return 1; }
        rm -f "$ROOT"/var/cache/apt/archives/*.deb
        tar -C "$ROOT" -cf "$archive.new" . && mv "$archive.new" "$archive"
    else
        mkdir -p "$ROOT" && tar -C "$ROOT" -xf "$archive"
    fi
}
installed() {
    files >"$WORK/before"
    cp "$PACKAGE" "$ROOT/tmp/package.deb"
    inside dpkg --install /tmp/package.deb >"$WORK/log" 2>&1 || { cat "$WORK/log" && return 1; }
    rm "$ROOT/tmp/package.deb"
    inside dpkg --verify vhost-device-vfio >"$WORK/verified"
    equal '' "$(cat "$WORK/verified")" "files that differ from the package"
}
runs() {
    equal "vhost-device-vfio $VERSION" "$(inside vhost-device-vfio --version)" "version"
    # The program itself is the child, so that it gets the signal.
    (exec chroot "$ROOT" /usr/bin/vhost-device-vfio --socket-path /tmp/disk.sock --device emulated:size=1M) >"$WORK/log" 2>&1 &
    within 10 grep -q 'serving emulated' "$WORK/log"
    kill %1
    wait %1
    [[ ! -e $ROOT/tmp/disk.sock ]]
}
found_by_qemu() {
    local program
    program=$(sed -n 's/.*"binary": "\(.*\)".*/\1/p' "$ROOT"/usr/share/qemu/vhost-user/*.json)
    inside "$program" --print-capabilities >"$WORK/capabilities"
    contains '{"type":"block",' "$WORK/capabilities"
    contains '"type": "block"' "$ROOT"/usr/share/qemu/vhost-user/50-vhost-device-vfio.json
}
documented() {
    local page
    for page in vhost-device-vfio vhost-device-vfio-inspect vhost-device-vfio-list; do
        gzip -dc "$ROOT/usr/share/man/man1/$page.1.gz" | groff -K utf8 -man -Tutf8 -ww >"$WORK/page" 2>"$WORK/remarks"
        equal '' "$(cat "$WORK/remarks")" "remarks of groff about $page"
        [[ -s $WORK/page ]]
    done
    bash -c '. "$1" && complete -p vhost-device-vfio' - "$ROOT/usr/share/bash-completion/completions/vhost-device-vfio" \
        >"$WORK/log"
}
# tests/outside/systemd.sh runs the units.
units_installed() {
    contains 'ExecStart=/usr/bin/vhost-device-vfio ' "$ROOT/usr/lib/systemd/system/vhost-device-vfio@.service"
    contains 'SocketGroup=vhost-device-vfio' "$ROOT/usr/lib/systemd/system/vhost-device-vfio@.socket"
    contains 'vhost-device-vfio:' "$ROOT/etc/group"
}
removed() {
    inside dpkg --purge vhost-device-vfio >"$WORK/log" 2>&1 || { cat "$WORK/log" && return 1; }
    files >"$WORK/after"
    equal '' "$(diff "$WORK/before" "$WORK/after")" "files that came or went"
}
cargo_installs() {
    cargo install --quiet --locked --offline --path backend --root "$WORK/cargo" 2>"$WORK/log" ||
        { tail -n 20 "$WORK/log" && return 1; }
    "$WORK/cargo/bin/vhost-device-vfio" --version >/dev/null
}
shim_packaged() {
    cargo package --quiet --locked --allow-dirty --package kvm-vfio-shim >"$WORK/log" 2>&1 ||
        { tail -n 20 "$WORK/log" && return 1; }
    equal '' "$(grep warning "$WORK/log")" "warnings of cargo package"
}

# Compiled from their own directories alone, the other two would take a minute.
crates_packaged() {
    local crate
    cargo package --quiet --locked --offline --allow-dirty --no-verify --workspace --exclude testbed >"$WORK/log" 2>&1 ||
        { tail -n 20 "$WORK/log" && return 1; }
    for crate in vhost-device-vfio kvm-vfio-shim kvm-vfio-shim-preload; do
        tar -tf "${CARGO_TARGET_DIR:-target}/package/$crate-$VERSION.crate" >"$WORK/contents"
        contains "$crate-$VERSION/README.md" "$WORK/contents"
        contains "$crate-$VERSION/src/lib.rs" "$WORK/contents"
    done
}

need debootstrap=debootstrap groff=groff
((EUID == 0)) || die "a root directory of its own needs root; run: sudo scripts/test outside/package"
claim "scripts/package builds a package whose files belong to root" built
((BROKEN == 0)) || finished
claim "it builds the same package again" same_twice
claim "Debian's installer makes a root directory" root_made
((BROKEN == 0)) || finished
claim "dpkg installs the package there" installed
claim "the installed program serves a disk" runs
claim "QEMU's description of back-ends names the program" found_by_qemu
claim "groff finds no fault in the manual pages, and bash takes the completions" documented
claim "the units are there, and so is their group" units_installed
claim "purged, it leaves no file" removed
claim "cargo install --path backend works" cargo_installs
claim "cargo package accepts the shim's crate" shim_packaged
claim "and all crates together, with their README" crates_packaged
finished
