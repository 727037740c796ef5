# shellcheck shell=bash
# A Rust toolchain for aarch64-unknown-linux-gnu: rustc, clippy and the standard library of Debian unstable or testing, unpacked
# into the cache without an installation, and Debian's cross gcc as the linker. Cargo is this machine's. Older suites' rustc is
# older than this workspace, and a rustup toolchain brings no second target along. Needs lib.sh.

readonly ARM64_TARGET=aarch64-unknown-linux-gnu
# A compiler reads only the library of its own version, and after an upload Debian has the two architectures' versions for some
# days in only one of the suites.
readonly ARM64_SUITES=(sid testing)
readonly ARM64_LIBC=/usr/aarch64-linux-gnu

# arm64_rust: the directory of the toolchain, which may not exist yet.
arm64_rust() {
    echo "$TESTBED_CACHE/arm64/rust-$(hash_of "$(declare -f fetch_arm64_rust download_arm64_rust unpack_arm64_rust
        cat "$TESTBED_DIR/arm64/rust-program")")"
}

# need_arm64_packages: installs the linker and the user emulation.
need_arm64_packages() {
    need aarch64-linux-gnu-gcc=gcc-aarch64-linux-gnu "$ARM64_LIBC/include/stdio.h=libc6-dev-arm64-cross"
    # QEMU 7.2 answers EINVAL to a shared mapping of huge pages, where the kernel would answer ENOMEM. QEMU 10 is right.
    need_qemu_program qemu-aarch64 qemu-user
}

# need_arm64_rust: fetches the toolchain if it is missing. It takes a lock of its own, because a kernel may be under construction.
need_arm64_rust() {
    local dir
    dir=$(arm64_rust)
    if [[ ! -e $dir/made-of ]]; then
        take_lock arm64-lock
        [[ -e $dir/made-of ]] || fetch_arm64_rust "$dir"
        drop_lock
    fi
    say "arm64: $(cat "$dir/made-of"), $(aarch64-linux-gnu-gcc --version | head -n 1), $(qemu-aarch64 --version | head -n 1)"
}

# fetch_arm64_rust DIR
fetch_arm64_rust() {
    local dir=$1 suite work version='' library
    for suite in "${ARM64_SUITES[@]}"; do
        work=$TESTBED_CACHE/apt/arm64-rust-$suite
        apt_private "arm64-rust-$suite" deb "$suite"
        # With an empty status file apt downloads every library.
        : >"$work/nothing-installed"
        APT_PRIVATE+=(-o "Dir::State::status=$work/nothing-installed" -o APT::Install-Recommends=no -o Debug::NoLocking=yes
            -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o Acquire::Languages=none)
        watched "reading the package list of $suite" "$work/update.log" true apt-get "${APT_PRIVATE[@]}" update
        version=$(apt-cache "${APT_PRIVATE[@]}" show --no-all-versions rustc:amd64 | sed -n 's/^Version: //p')
        ! apt-cache "${APT_PRIVATE[@]}" show "libstd-rust-dev:arm64=$version" >/dev/null 2>&1 || break
        say "arm64: $suite has rustc '$version' for amd64, and its library not for arm64"
        version=''
    done
    [[ -n $version ]] || die "arm64: no rustc with the same version of its arm64 library in ${ARM64_SUITES[*]};" \
        "after an upload Debian has it within days (or the mirror cannot be reached: $work/update.log)"
    library=$(apt-cache "${APT_PRIVATE[@]}" depends rustc rust-clippy | sed -n 's/^ *Depends: \(libstd-rust-[0-9.]*\)$/\1/p')
    watched "fetching rustc $version of $suite with the arm64 library (150 MB)" "$work/fetch.log" fetched \
        download_arm64_rust "$work" "$version" "$library"
    watched "unpacking it" "$work/unpack.log" fetched unpack_arm64_rust "$work" "$dir.new"
    echo "rustc $version of Debian $suite" >"$dir.new/made-of"
    rm -rf "$work/cache/archives" "$dir"
    mv "$dir.new" "$dir"
}

# download_arm64_rust WORK VERSION LIBRARY: rustc's package depends on a native gcc, which is not needed.
download_arm64_rust() {
    rm -rf "$1/cache/archives"
    mkdir -p "$1/cache/archives/partial"
    apt-get "${APT_PRIVATE[@]}" install --yes --download-only "$3=$2" &&
        env -C "$1/cache/archives" apt-get "${APT_PRIVATE[@]}" download "rustc=$2" "rust-clippy=$2" "libstd-rust-dev=$2" \
            "libstd-rust-dev:arm64=$2"
}

# unpack_arm64_rust WORK DIR: the programs run through Debian unstable's own loader, because this machine's libc may be older.
unpack_arm64_rust() {
    local dir=$2 package name
    rm -rf "$dir"
    mkdir -p "$dir/bin"
    for package in "$1"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$dir" || return 1; done
    [[ -d $dir/usr/lib/rustlib/$ARM64_TARGET/lib ]] || return 1
    for name in rustc clippy-driver; do
        # The directory is found at each start: this one is renamed when it is complete.
        sed "s/@PROGRAM@/$name/" "$TESTBED_DIR/arm64/rust-program" >"$dir/bin/$name" && chmod +x "$dir/bin/$name" &&
            "$dir/bin/$name" --version || return 1
    done
}
