# shellcheck shell=bash
# The distribution's own kernel, extracted from its package without an installation: the image, and the modules that a small
# guest needs, in the order in which to load them. Needs lib.sh.

# Modules for a virtio disk and an ext4 file system, without their dependencies.
readonly DEBIAN_MODULES=(virtio_pci virtio_blk crc32c_generic ext4)

# debian_kernel: prints a directory with vmlinuz, the modules, and their names in modules/order.
debian_kernel() {
    local codename dir work package
    codename=$(debian_codename)
    dir=$TESTBED_CACHE/debian-kernel/$codename
    [[ ! -e $dir/modules/order ]] || { echo "$dir" && return; }
    take_lock
    work=$TESTBED_CACHE/apt/debian-kernel-$codename
    apt_private "debian-kernel-$codename" deb "$codename"
    watched "reading the package list of $codename" "$work/update.log" true apt-get "${APT_PRIVATE[@]}" update
    package=$(apt-cache "${APT_PRIVATE[@]}" depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    [[ -n $package ]] || die "linux-image-amd64 of $codename depends on no kernel"
    watched "fetching $package, Debian's own kernel" "$work/fetch.log" true fetch_debian_kernel "$work" "$package"
    watched "unpacking it" "$work/unpack.log" true unpack_debian_kernel "$work" "$package" "$dir.new"
    rm -rf "$dir" "$work/tree"
    mv "$dir.new" "$dir"
    drop_lock
    echo "$dir"
}

fetch_debian_kernel() { rm -f "$1"/*.deb && env -C "$1" apt-get "${APT_PRIVATE[@]}" download "$2"; }

unpack_debian_kernel() {
    local work=$1 dir=$3 module
    rm -rf "$work/tree" "$dir"
    mkdir -p "$work/tree" "$dir/modules"
    dpkg-deb --extract "$(echo "$work/$2"_*.deb)" "$work/tree" || return 1
    cp "$work"/tree/boot/vmlinuz-* "$dir/vmlinuz" || return 1
    : >"$dir/modules/order"
    for module in "${DEBIAN_MODULES[@]}"; do take_module "$work/tree" "$dir/modules" "$module" || return 1; done
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
