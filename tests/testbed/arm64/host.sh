# shellcheck shell=bash
# An emulated arm64 host with an IOMMU, a GICv3 with an ITS, and empty NVMe drives at 0000:00:04.0 and 0000:00:05.0, on TCG. It
# runs Debian's own arm64 kernel of backports, which has no iommufd, or that of kernel.sh. Its programs are busybox, this checkout's,
# and Debian's libc. Everything is unpacked from Debian packages into the cache, and nothing is installed but QEMU. Needs lib.sh,
# debian_kernel.sh, kernel.sh and guest_qemu.sh.

readonly ARM64_HOST_SUITE=trixie-backports
# What is built into one kernel is a module in the next.
readonly ARM64_HOST_MODULES=(virtio_pci nvme vfio_iommu_type1 vfio_pci)
readonly ARM64_GUEST_MODULES=(virtio_pci virtio_blk)
readonly ARM64_HOST_LIBRARIES=(ld-linux-aarch64.so.1 libc.so.6 libgcc_s.so.1 libm.so.6)

# arm64_host_files KERNEL: prints a directory with vmlinuz, the modules of a host and of a
# guest, and root/. KERNEL is a package, such as linux-image-arm64.
arm64_host_files() {
    local kernel=$1 dir work package parts
    dir=$TESTBED_CACHE/arm64/$1-$(hash_of "$(declare -f arm64_host_files unpack_arm64_host && declare -p "${!ARM64_HOST_@}" \
        ARM64_GUEST_MODULES)")
    [[ ! -e $dir/complete ]] || { echo "$dir" && return; }
    take_lock arm64-lock
    [[ ! -e $dir/complete ]] || { drop_lock && echo "$dir" && return; }
    work=$TESTBED_CACHE/apt/arm64-host
    apt_private arm64-host deb "$ARM64_HOST_SUITE" "${ARM64_HOST_SUITE%-backports}"
    : >"$work/nothing-installed"
    APT_PRIVATE+=(-o "Dir::State::status=$work/nothing-installed" -o Acquire::Languages=none
        -o APT::Architecture=arm64 -o APT::Architectures::=arm64)
    watched "reading the arm64 package list of $ARM64_HOST_SUITE" "$work/update.log" true \
        apt-get "${APT_PRIVATE[@]}" update
    package=$(depends_on "$kernel" 'linux-image-[0-9].*')
    [[ -n $package ]] || die "$kernel of $ARM64_HOST_SUITE depends on no kernel"
    readarray -t parts < <(depends_on "$package" 'linux-\(binary\|modules\)-[0-9].*')
    watched "fetching $package, Debian's own arm64 kernel (100 MB)" "$work/fetch.log" fetched \
        fetch_debian_kernel "$work" "$package" "${parts[@]}" busybox-static libc6 libgcc-s1
    watched "unpacking it" "$work/unpack.log" true unpack_arm64_host "$work" "$dir.new"
    rm -rf "$dir" "$work/tree" "$work"/*.deb
    mv "$dir.new" "$dir"
    drop_lock
    echo "$dir"
}

# unpack_arm64_host WORK DIR
unpack_arm64_host() {
    local tree=$1/tree root=$2/root name
    unpack_debian_kernel "$1" "$2" "${ARM64_HOST_MODULES[@]}" && mkdir "$2/guest" && : >"$2/guest/order" || return 1
    for name in "${ARM64_GUEST_MODULES[@]}"; do take_module "$tree" "$2/guest" "$name" || return 1; done
    mkdir -p "$root"/{bin,dev,etc,lib,mnt,proc,root,run,sys,tmp,usr/bin,usr/local/bin,testbed/tests}
    cp "$tree/usr/bin/busybox" "$root/bin/" || return 1
    for name in "${ARM64_HOST_LIBRARIES[@]}"; do
        cp -L "$tree/usr/lib/aarch64-linux-gnu/$name" "$root/lib/" || return 1
    done
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    cp -r "$2/modules" "$root/testbed/" && touch "$2/complete"
}

# arm64_guest_files ROOT KERNEL: QEMU, and Debian's KERNEL for its guest.
arm64_guest_files() {
    local files
    files=$(arm64_host_files "$2")
    mkdir -p "$1/opt" "$1/testbed/guest" && cp -r "$(arm64_guest_qemu)" "$1/opt/qemu" &&
        cp "$files/vmlinuz" "$1/testbed/guest/" && cp -r "$files/guest" "$1/testbed/guest/modules"
}

# arm64_host TEST KERNEL TREE: boots it with the files of TREE, runs tests/arm64/TEST.sh there, prints what that prints, and
# returns its status. KERNEL is a package of Debian, or "iommufd".
arm64_host() {
    local test=$1 kernel=$2 tree=$3 files image='' work status=$EXIT_TESTBED
    local machine=(-machine "virt,iommu=smmuv3,gic-version=3,virtualization=on")
    [[ $test != virtio_iommu ]] || machine=(-machine "virt,gic-version=3,virtualization=on" -device virtio-iommu-pci,addr=2)
    need_qemu_program qemu-system-aarch64 qemu-system-arm
    need cpio=cpio
    work=$(mktemp -d "${TMPDIR:-/tmp}/arm64.XXXXXX")
    files=$(arm64_host_files "${kernel/#iommufd/linux-image-arm64}")
    cp -r "$files/root" "$work/root"
    case $kernel in
    iommufd) # it has no modules
        : >"$work/root/testbed/modules/order"
        image=$(arm64_kernel_image)
        ;;
    # The guest's pages have the other size.
    *-16k) arm64_guest_files "$work/root" linux-image-arm64 ;;
    *) arm64_guest_files "$work/root" linux-image-arm64-16k ;;
    esac
    cp -r "$tree/." "$work/root/"
    cp "$TESTBED_DIR/arm64/init" "$work/root/init"
    cp "$TESTBED_DIR/claims.sh" "$work/root/testbed/"
    cp "$TESTBED_ROOT/tests/host/lib.sh" "$work/root/testbed/tests/"
    cp -r "$TESTBED_ROOT/tests/arm64" "$work/root/testbed/"
    echo "sh /testbed/arm64/$test.sh" >"$work/root/testbed/command"
    (cd "$work/root" && find . -print0 | cpio --null --create --format=newc --owner=0:0 --quiet) >"$work/initrd"
    truncate -s 64M "$work/drive" "$work/second"
    # resource_alignment: a BAR is mapped only if it has its pages to itself, and NVMe's has 16 KiB. pauth: the emulation computes
    # each signature of a return address.
    timeout 900 qemu-system-aarch64 "${machine[@]}" -cpu max,pauth=off \
        -accel tcg -smp 2 -m 2G -nodefaults -no-user-config -display none -no-reboot \
        -kernel "${image:-$files/vmlinuz}" -initrd "$work/initrd" \
        -append "console=ttyAMA0 panic=-1 oops=panic quiet pci=resource_alignment=0000:00:04.0;0000:00:05.0" \
        -serial "file:$work/console" -drive "if=none,id=drive,format=raw,cache=unsafe,file=$work/drive" \
        -device nvme,drive=drive,serial=testbed,addr=4 \
        -drive "if=none,id=second,format=raw,cache=unsafe,file=$work/second" \
        -device nvme,drive=second,serial=second,addr=5 </dev/null >&2 || true
    tr -d '\r' <"$work/console" >"$work/lines"
    if grep -q '^testbed: status [0-9]*$' "$work/lines"; then
        status=$(sed -n 's/^testbed: status //p' "$work/lines")
        sed '/^testbed: status /d' "$work/lines"
    else
        sed 's/^/# /' "$work/lines"
        say "the arm64 host ended without the status of its test"
    fi
    rm -rf "$work"
    return "$status"
}
