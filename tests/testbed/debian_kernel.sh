# shellcheck shell=bash
# Debian's own kernels, extracted from their packages without an installation: the image, and the modules that a machine needs,
# in the order in which to load them. Needs lib.sh.

# Modules, without their dependencies: for a guest with a virtio disk and an ext4 file system, for an emulated host, and for a
# guest with a zoned disk.
readonly DEBIAN_MODULES=(virtio_pci virtio_blk crc32c_generic ext4)
# shellcheck disable=SC2034 # used by scripts/testbed
readonly DEBIAN_HOST_MODULES=(virtio_pci virtio_console 9p 9pnet_virtio kvm_amd nvme vfio_iommu_type1 vfio_pci)
# shellcheck disable=SC2034 # the same
readonly DEBIAN_GUEST_MODULES=(virtio_pci virtio_console virtio_blk ext4 zonefs btrfs)

# debian_kernel [SUITE MODULE…]: prints a directory with vmlinuz, the modules (default: DEBIAN_MODULES), and their names in
# modules/order. Without SUITE it is this machine's release.
debian_kernel() {
    local suite=${1:-$(debian_codename)} dir work package parts suites
    shift || true
    (($#)) || set -- "${DEBIAN_MODULES[@]}"
    dir=$TESTBED_CACHE/debian-kernel/$suite-$(hash_of "$*")
    [[ ! -e $dir/modules/order ]] || { echo "$dir" && return; }
    take_lock
    # Another host may have fetched it meanwhile.
    [[ ! -e $dir/modules/order ]] || { drop_lock && echo "$dir" && return; }
    work=$TESTBED_CACHE/apt/debian-kernel-$suite
    # Backports depend on packages of their release.
    suites=("$suite")
    [[ $suite != *-backports ]] || suites+=("${suite%-backports}")
    apt_private "debian-kernel-$suite" deb "${suites[@]}"
    watched "reading the package list of $suite" "$work/update.log" true apt-get "${APT_PRIVATE[@]}" update
    package=$(depends_on linux-image-amd64 'linux-image-[0-9].*')
    [[ -n $package ]] || die "linux-image-amd64 of $suite depends on no kernel"
    readarray -t parts < <(depends_on "$package" 'linux-\(binary\|modules\)-[0-9].*')
    watched "fetching $package, Debian's own kernel" "$work/fetch.log" true \
        fetch_debian_kernel "$work" "$package" "${parts[@]}"
    watched "unpacking it" "$work/unpack.log" true unpack_debian_kernel "$work" "$dir.new" "$@"
    rm -rf "$dir" "$work/tree" "$work"/*.deb
    mv "$dir.new" "$dir"
    drop_lock
    echo "$dir"
}

# depends_on PACKAGE PATTERN: its dependencies that match. Since Linux 7.3 the image's package has none of its files.
depends_on() { apt-cache "${APT_PRIVATE[@]}" depends "$1" | sed -n "s/^ *Depends: \\($2\\)\$/\\1/p"; }

fetch_debian_kernel() { rm -f "$1"/*.deb && env -C "$1" apt-get "${APT_PRIVATE[@]}" download "${@:2}"; }

# unpack_debian_kernel WORK DIR MODULE…
unpack_debian_kernel() {
    local work=$1 dir=$2 package module
    shift 2
    rm -rf "$work/tree" "$dir"
    mkdir -p "$work/tree" "$dir/modules"
    for package in "$work"/*.deb; do dpkg-deb --extract "$package" "$work/tree" || return 1; done
    find "$work/tree" -name 'vmlinuz*' -exec cp {} "$dir/vmlinuz" \; && [[ -s $dir/vmlinuz ]] || return 1
    : >"$dir/modules/order"
    for module; do take_module "$work/tree" "$dir/modules" "$module" || return 1; done
}

# take_module TREE DIR NAME: copies the module's dependencies and then the module. A module that is built in has no file.
take_module() {
    local file name=$3 dependency
    ! grep -qx "$name.ko" "$2/order" || return 0
    file=$(find "$1" -path '*/kernel/*' -name "${name//_/[-_]}.ko*" | head -n 1)
    [[ -n $file ]] || return 0
    case $file in
    *.xz) xz --decompress --stdout "$file" ;;
    *.zst) zstd --decompress --quiet --stdout "$file" ;;
    *) cat "$file" ;;
    esac >"$2/$name.ko" || return 1
    for dependency in $(tr '\0' '\n' <"$2/$name.ko" | sed -n 's/^depends=//p' | tr , ' '); do
        take_module "$1" "$2" "$dependency" || return 1
    done
    echo "$name.ko" >>"$2/order"
}
