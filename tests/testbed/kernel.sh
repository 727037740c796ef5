# shellcheck shell=bash
# The testbed's kernel: Debian's source with kernel.config, built once and cached. Debian's own kernels have no CONFIG_IOMMUFD.

readonly KERNEL_SERIES=linux-source-7.2
# Object files in a build with this configuration; used only for the percentage shown.
readonly KERNEL_OBJECT_FILES=1635

[[ -r ${TESTBED_KERNEL:-/} ]] || die "TESTBED_KERNEL=$TESTBED_KERNEL: no such file (wanted: a bzImage)"

# kernel_key: a hash of what the image depends on; empty until a source has been chosen.
kernel_key() {
    local version=$TESTBED_CACHE/linux-source/version
    if [[ -n ${TESTBED_KERNEL:-} ]]; then
        hash_of "$(sha256sum <"$TESTBED_KERNEL")"
    elif [[ -e $version ]]; then
        hash_of "$(cat "$version" "$TESTBED_DIR/kernel.config"; gcc --version 2>/dev/null | head -n 1 || true)"
    fi
}

# kernel_image: the path of the image for the current key. It may not exist.
kernel_image() { echo "$TESTBED_CACHE/kernel-$(kernel_key)/bzImage"; }

build_kernel() {
    local image dir
    if [[ -n ${TESTBED_KERNEL:-} ]]; then
        install -D -m 644 "$TESTBED_KERNEL" "$(kernel_image)"
        return
    fi
    image=$(kernel_image)
    [[ ! -e $image ]] || return 0
    fetch_kernel_source
    image=$(kernel_image)
    [[ ! -e $image ]] || return 0
    dir=${image%/bzImage}.build
    unpack_kernel_source "$dir"
    KERNEL_OBJECTS=$dir/objects
    watched "configuring Linux $(cut -d ' ' -f 2 "$TESTBED_CACHE/linux-source/version")" "$dir/configure.log" \
        kernel_progress configure_kernel "$dir/source" "$dir/objects" "$TESTBED_DIR/kernel.config"
    watched "building the kernel (once)" "$dir/build.log" \
        kernel_progress make -C "$dir/source" O="$dir/objects" -j"$(nproc)" bzImage
    mkdir -p "${image%/bzImage}"
    cp "$dir/objects/.config" "${image%/bzImage}/config"
    mv "$dir/objects/arch/x86/boot/bzImage" "$image"
    rm -rf "$dir"
    say "kernel: $image ($(du -h "$image" | cut -f 1))"
}

# Fetches the series with which this testbed was tested, or the newest one if Debian no longer has it.
fetch_kernel_source() {
    local dir=$TESTBED_CACHE/linux-source codename suite package
    [[ ! -e $dir/version ]] || return 0
    codename=$(debian_codename)
    case $codename in
    bookworm | trixie) suite=trixie-backports ;;
    *) suite=$codename ;;
    esac
    apt_private "kernel" deb "$suite"
    mkdir -p "$dir"
    watched "reading the package list of $suite" "$dir/apt.log" true apt-get "${APT_PRIVATE[@]}" update
    package=$KERNEL_SERIES
    if ! apt-cache "${APT_PRIVATE[@]}" show "$package" >/dev/null 2>&1; then
        package=$(apt-cache "${APT_PRIVATE[@]}" search --names-only '^linux-source-[0-9.]+$' |
            cut -d ' ' -f 1 | sort -V | tail -n 1)
        [[ -n $package ]] || die "no linux-source package in $suite; name a kernel of your own with" \
            "TESTBED_KERNEL=/path/to/bzImage (its configuration: $TESTBED_DIR/kernel.config)"
        say "$KERNEL_SERIES is no longer in $suite; using $package"
    fi
    watched "fetching $package (about 160 MB)" "$dir/apt.log" kernel_fetch_progress \
        env -C "$dir" apt-get "${APT_PRIVATE[@]}" download "$package"
    # Renamed in one step, so that it exists only after apt has verified the download.
    (cd "$dir" && ls "$package"_*.deb) | tr _ ' ' >"$dir/version.new"
    mv "$dir/version.new" "$dir/version"
}
kernel_fetch_progress() { du -sh "$TESTBED_CACHE/linux-source" | sed 's/\s.*/ fetched/'; }

unpack_kernel_source() {
    local dir=$1 package rest
    [[ ! -d $dir/source ]] || return 0
    read -r package rest <"$TESTBED_CACHE/linux-source/version"
    rm -rf "$dir.new"
    mkdir -p "$dir.new/source" "$dir.new/objects" "$dir"
    watched "unpacking $package" "$dir/unpack.log" unpack_progress unpack_deb \
        "$(echo "$TESTBED_CACHE/linux-source/${package}"_*.deb)" "$dir.new"
    mv "$dir.new/objects" "$dir.new/source" "$dir"
    rm -rf "$dir.new"
}
unpack_deb() {
    dpkg-deb --extract "$1" "$2/deb" &&
        tar --extract --xz --strip-components=1 --directory "$2/source" --file "$2"/deb/usr/src/linux-source-*.tar.xz
}
unpack_progress() { echo "unpacking"; }

# configure_kernel SOURCE OBJECTS CONFIG [VARIABLE=VALUE]…: the variables are make's, for another architecture.
configure_kernel() {
    local source=$1 objects=$2 config=$3
    shift 3
    make -C "$source" O="$objects" "$@" tinyconfig &&
        (cd "$source" && scripts/kconfig/merge_config.sh -m -O "$objects" "$objects/.config" "$config") &&
        make -C "$source" O="$objects" "$@" olddefconfig && check_configuration "$objects/.config" "$config"
}

# check_configuration FOUND WANTED: merge_config silently drops options whose dependencies are not met.
check_configuration() {
    local wanted refused=0
    while read -r wanted; do
        [[ $wanted == CONFIG_*=* && $wanted != *=n ]] || continue
        grep -qxF "$wanted" "$1" || { echo "this kernel does not accept $wanted" && refused=1; }
    done <"$2"
    return "$refused"
}

# Counts the files that exist, so that a resumed build shows its true percentage.
kernel_progress() {
    local percent
    percent=$(($(find "$KERNEL_OBJECTS" -name '*.o' | wc -l) * 100 / KERNEL_OBJECT_FILES))
    echo "$((percent > 99 ? 99 : percent)) %"
}
