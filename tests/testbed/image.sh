# shellcheck shell=bash
# The two images. Both are initramfs archives. The guest's is small and part of the host's. Neither contains files of this
# checkout: those are in a second archive, created at each start.

readonly HOST_PROGRAMS=(qemu-system-x86_64 qemu-storage-daemon qemu-img flock)
readonly GUEST_PROGRAMS=(mkfs.ext4 e2fsck blkid)
readonly FIRMWARE=(bios-256k.bin kvmvapic.bin linuxboot_dma.bin linuxboot.bin pvh.bin efi-virtio.rom)

# closure PROGRAM…: the libraries and the loader that the programs need, one path per line.
closure() {
    local listing
    listing=$(ldd "$@" 2>/dev/null || true) # ldd fails for a static program
    if grep 'not found' <<<"$listing" >&2; then
        die "libraries missing for: $*"
    fi
    awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\// && $2 ~ /^\(/ { print $1 }' <<<"$listing" | sort -u
}

# place ROOT DEST FILE: copies FILE, following links.
place() {
    mkdir -p "$1$(dirname "$2")"
    cp -L --preserve=mode,timestamps "$3" "$1$2"
}

# place_programs ROOT PROGRAM…: copies programs to /usr/bin, and their libraries to the paths that they have here.
place_programs() {
    local root=$1 file
    shift
    for file; do
        place "$root" "/usr/bin/$(basename "$file")" "$file"
    done
    closure "$@" | while read -r file; do
        [[ -e $root$file ]] || place "$root" "$file" "$file"
    done
}

# The directories and basic commands of both machines.
place_base() {
    local root=$1 applet
    mkdir -p "$root"/{bin,dev,etc,lib64,mnt,out,proc,root,run,sys,tmp,usr/bin,usr/sbin,usr/local/bin,var/tmp}
    ln -s /proc/mounts "$root/etc/mtab"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
    place_programs "$root" "$(command -v busybox)"
    for applet in $(busybox --list); do
        [[ $applet == busybox ]] || ln -s /usr/bin/busybox "$root/bin/$applet"
    done
}

# archive DIRECTORY: prints its contents in the kernel's initramfs format.
archive() { (cd "$1" && find . -print0 | sort -z | cpio --null --create --format=newc --owner=0:0 --quiet); }

# image_key: a hash of what the images depend on, by size and time of the programs instead of their contents.
image_key() {
    local program paths=()
    for program in busybox "${HOST_PROGRAMS[@]}" "${GUEST_PROGRAMS[@]}"; do
        paths+=("$(command -v "$program" || echo "/missing/$program")")
    done
    hash_of "$(kernel_key; cat "$TESTBED_DIR/image.sh"; stat -Lc '%n %s %Y' "${paths[@]}" 2>/dev/null)"
}
host_image() { echo "$TESTBED_CACHE/host-$(image_key).cpio"; }

need_image_programs() {
    need_qemu
    need busybox=busybox-static mkfs.ext4=e2fsprogs cpio=cpio /usr/share/seabios/bios-256k.bin=seabios
}

build_images() {
    local image work
    image=$(host_image)
    [[ ! -e $image ]] || return 0
    say "building the host's image and the guest's"
    work=$(mktemp -d "$TESTBED_CACHE/image.XXXXXX")
    place_guest "$work/guest"
    place_base "$work/host"
    place_programs "$work/host" "${HOST_PROGRAMS[@]/#//usr/bin/}"
    place_firmware "$work/host"
    place "$work/host" /testbed/bzImage "$(kernel_image)"
    archive "$work/guest" >"$work/host/testbed/guest.cpio"
    archive "$work/host" >"$work/host.cpio"
    (cd "$work/host" && find . -type f | sed 's/^\.//') >"$image.files"
    mv "$work/host.cpio" "$image"
    rm -rf "$work"
    say "  host image: $image ($(du -h "$image" | cut -f 1))"
    # Each change of QEMU or of the kernel leaves an old image.
    find "$TESTBED_CACHE" -maxdepth 1 -name 'host-*' ! -path "$image*" -mtime +7 -delete
}

place_guest() {
    local root=$1 program paths=()
    place_base "$root"
    for program in "${GUEST_PROGRAMS[@]}"; do paths+=("$(command -v "$program")"); done
    place_programs "$root" "${paths[@]}"
    place "$root" /usr/bin/fio "$(fio_program)"
    mkdir -p "$root/etc"
    cp /etc/mke2fs.conf "$root/etc/"
}

place_firmware() {
    local root=$1 name directory
    for name in "${FIRMWARE[@]}"; do
        for directory in /usr/share/qemu /usr/share/seabios /usr/lib/ipxe/qemu /usr/share/qemu-firmware; do
            [[ ! -e $directory/$name ]] || { place "$root" "/usr/share/qemu/$name" "$directory/$name" && break; }
        done
    done
}

# Debian's fio needs 80 MB of libraries (Ceph, ICU …), too much for a guest on emulated processors. So the same source is built
# here without them.
fio_program() { echo "$TESTBED_CACHE/fio/fio"; }

build_fio() {
    local dir=$TESTBED_CACHE/fio
    [[ ! -x $dir/fio ]] || return 0
    watched "fetching and building fio, in parallel with the kernel" "$dir.log" fio_progress make_fio "$dir"
}
make_fio() {
    local dir=$1 suite archive part without=(--build-static --disable-native)
    # Any version will do, and not every mirror has the sources of every suite.
    for suite in "$(debian_codename)" trixie bookworm sid; do
        rm -rf "$dir"
        mkdir -p "$dir/source"
        apt_private "fio-$suite" deb-src "$suite"
        apt-get "${APT_PRIVATE[@]}" update || continue
        (cd "$dir" && apt-get "${APT_PRIVATE[@]}" source --download-only fio) && break
    done
    archive=$(find "$dir" -maxdepth 1 -name 'fio_*.orig.tar.?z')
    tar --extract --strip-components=1 --directory "$dir/source" --file "$archive" || return 1
    cd "$dir/source" || return 1
    # The engines that need libraries. configure fails on an option that its version does not know.
    for part in numa rdma rados rbd http gfapi pmem libnfs xnvme libzbc libblkio tcmalloc; do
        ! grep -q -e "--disable-$part)" configure || without+=("--disable-$part")
    done
    ./configure "${without[@]}" &&
        make -j"$(nproc)" fio && strip fio && mv fio "$dir/fio.new" && mv "$dir/fio.new" "$dir/fio"
}
fio_progress() { echo "fio: still building"; }
