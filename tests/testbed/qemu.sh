# shellcheck shell=bash
# A QEMU other than this machine's, as the front-end: from a suite of Debian, together with the loader, libraries and firmware
# that it needs. It runs here and in the emulated host without an installation.

readonly QEMU_PROGRAMS=(qemu-system-x86_64 qemu-img qemu-io)
# qemu-block-extra also contains modules that need Ceph and Gluster. Only this one and its library are used.
readonly QEMU_MODULES=(block-blkio.so)
readonly QEMU_PACKAGES=(qemu-system-x86 qemu-utils libblkio1)

# fetch_qemu SUITE: prints a directory for TESTBED_QEMU with the suite's current QEMU. Debian unstable changes, so this reads the
# package list each time. A version that is already in the cache is not fetched again.
fetch_qemu() {
    local suite=$1 work=$TESTBED_CACHE/apt/qemu-$1 dir=$TESTBED_CACHE/qemu/$1 version made_of
    take_lock
    # Backports depend on packages of their release.
    if [[ $suite == *-backports ]]; then
        apt_private "qemu-$suite" deb "$suite" "${suite%-backports}"
    else
        apt_private "qemu-$suite" deb "$suite"
    fi
    # With an empty status file apt downloads every library.
    : >"$work/nothing-installed"
    APT_PRIVATE+=(-o "Dir::State::status=$work/nothing-installed" -o APT::Install-Recommends=no)
    watched "reading the package list of $suite" "$work/update.log" true apt-get "${APT_PRIVATE[@]}" update
    version=$(apt-cache "${APT_PRIVATE[@]}" show --no-all-versions qemu-system-x86 | sed -n 's/^Version: [0-9]*:*//p')
    [[ -n $version ]] || die "no package qemu-system-x86 in $suite"
    made_of="$version $(hash_of "$(cat "$TESTBED_DIR"/qemu.sh "$TESTBED_DIR"/qemu-program)")"
    if [[ $(cat "$dir/made-of" 2>/dev/null) != "$made_of" ]]; then
        watched "fetching QEMU $version of $suite" "$work/fetch.log" fetched download_qemu "$work"
        watched "unpacking it" "$work/unpack.log" fetched unpack_qemu "$work" "$dir.new"
        echo "$made_of" >"$dir.new/made-of"
        rm -rf "$work/cache/archives" "$work/tree" "$dir"
        mv "$dir.new" "$dir"
    fi
    drop_lock
    echo "$dir"
}
# cached_qemu SUITE: the suite's QEMU in the cache, even if the suite has a newer one.
cached_qemu() {
    local dir=$TESTBED_CACHE/qemu/$1
    if [[ -e $dir/made-of ]]; then echo "$dir"; else fetch_qemu "$1"; fi
}

download_qemu() {
    rm -rf "$1/cache/archives"
    mkdir -p "$1/cache/archives/partial"
    apt-get "${APT_PRIVATE[@]}" -o Debug::NoLocking=yes install --yes --download-only "${QEMU_PACKAGES[@]}" &&
        env -C "$1/cache/archives" apt-get "${APT_PRIVATE[@]}" download qemu-block-extra
}

# unpack_qemu WORK DIR: extracts from the packages what the programs and modules use:
#   bin/ wrapper scripts   programs/ QEMU   loader/ ld.so under the programs' names   lib/   modules/   firmware/
unpack_qemu() {
    local tree=$1/tree dir=$2 loader library name package
    rm -rf "$tree" "$dir"
    mkdir -p "$tree" "$dir"/{bin,programs,loader,lib,modules,firmware}
    for package in "$1"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$tree" || return 1; done
    library=$tree/usr/lib/x86_64-linux-gnu
    loader=$library/ld-linux-x86-64.so.2
    for name in "${QEMU_PROGRAMS[@]}"; do
        cp "$tree/usr/bin/$name" "$dir/programs/" && cp -L "$loader" "$dir/loader/$name" &&
            cp "$TESTBED_DIR/qemu-program" "$dir/bin/$name" || return 1
    done
    for name in "${QEMU_MODULES[@]}"; do cp "$library/qemu/$name" "$dir/modules/" || return 1; done
    # Not every version has all of these files.
    for name in "${FIRMWARE[@]}"; do find "$tree/usr/share" -name "$name" -exec cp -Lt "$dir/firmware" {} +; done
    for name in "$dir"/programs/* "$dir"/modules/*; do
        "$loader" --library-path "$library" --list "$name" || return 1
    done >"$1/libraries"
    ! grep 'not found' "$1/libraries" || return 1
    awk '$2 == "=>" { print $3 }' "$1/libraries" | sort -u | xargs cp -Lt "$dir/lib"
}
