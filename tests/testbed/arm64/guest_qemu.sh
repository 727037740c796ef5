# shellcheck shell=bash
# QEMU for a guest of the arm64 host's KVM: Debian's own for arm64, with its loader and libraries, in /opt/qemu of the host. Needs
# lib.sh.

readonly ARM64_QEMU_SUITE=trixie

# arm64_guest_qemu: prints a directory with bin/qemu-system-aarch64 and lib/.
arm64_guest_qemu() {
    local dir work=$TESTBED_CACHE/apt/arm64-qemu
    dir=$TESTBED_CACHE/arm64/qemu-$(hash_of "$(declare -f arm64_guest_qemu unpack_arm64_guest_qemu)")
    [[ ! -e $dir ]] || { echo "$dir" && return; }
    take_lock arm64-lock
    [[ ! -e $dir ]] || { drop_lock && echo "$dir" && return; }
    apt_private arm64-qemu deb "$ARM64_QEMU_SUITE"
    # With an empty status file apt downloads every library.
    : >"$work/nothing-installed"
    APT_PRIVATE+=(-o "Dir::State::status=$work/nothing-installed" -o APT::Install-Recommends=no -o Debug::NoLocking=yes
        -o Acquire::Languages=none -o APT::Architecture=arm64 -o APT::Architectures::=arm64)
    watched "reading the arm64 package list of $ARM64_QEMU_SUITE" "$work/update.log" true apt-get "${APT_PRIVATE[@]}" update
    watched "fetching QEMU for arm64 (35 MB)" "$work/fetch.log" fetched \
        apt-get "${APT_PRIVATE[@]}" install --yes --download-only qemu-system-arm
    watched "unpacking it" "$work/unpack.log" true unpack_arm64_guest_qemu "$work" "$dir.new"
    rm -rf "$work/cache/archives" "$work/tree"
    mv "$dir.new" "$dir"
    drop_lock
    echo "$dir"
}

# unpack_arm64_guest_qemu WORK DIR: the loader, under user emulation, says which libraries QEMU needs.
unpack_arm64_guest_qemu() {
    local tree=$1/tree dir=$2 package library=$1/tree/usr/lib/aarch64-linux-gnu
    rm -rf "$tree" "$dir"
    mkdir -p "$tree" "$dir"/{bin,lib}
    for package in "$1"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$tree" || return 1; done
    qemu-aarch64 "$library/ld-linux-aarch64.so.1" --library-path "$library" --list "$tree/usr/bin/qemu-system-aarch64" \
        >"$1/libraries" && ! grep 'not found' "$1/libraries" || return 1
    awk '$2 == "=>" { print $3 }' "$1/libraries" | xargs cp -Lt "$dir/lib" && cp -L "$library/ld-linux-aarch64.so.1" "$dir/lib" &&
        cp "$tree/usr/bin/qemu-system-aarch64" "$dir/bin"
}
