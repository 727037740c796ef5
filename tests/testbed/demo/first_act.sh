# shellcheck shell=bash
# The first act of the demo: the embedded drive, stock QEMU, and a guest with the distribution's own kernel. It needs root only
# to install packages, and no kernel build, KVM, IOMMU or NVMe drive. Needs lib.sh, image.sh and debian_kernel.sh.

# first_act PROGRAM WORK: PROGRAM serves a drive that is a file in WORK; compares the checksums at the end.
first_act() {
    local program=$1 work=$2 kernel backend
    kernel=$(debian_kernel)
    make_initrd "$kernel" "$work"
    "$program" --socket-path "$work/disk.sock" --device "emulated:file=$work/disk.img,create=on,size=64M" \
        >"$work/backend.log" 2>&1 &
    backend=$!
    until listens "$work/disk.sock"; do
        kill -0 "$backend" 2>/dev/null || { cat "$work/backend.log" >&2 && die "the backend has ended"; }
        sleep 0.1
    done
    act "Act one: a drive in this process, and a guest on Debian's own kernel" \
        "$(sed -n 's/^[^]]*\] \(serving .*\)/backend: \1/p' "$work/backend.log")" \
        "front-end: $(qemu-system-x86_64 --version | head -n 1 | cut -d '(' -f 1), TCG"
    timeout --kill-after=5 170 qemu-system-x86_64 -M q35,memory-backend=mem -accel tcg -cpu max -m 256M -nodefaults \
        -display none -no-reboot -serial "file:$work/console" \
        -object memory-backend-memfd,id=mem,size=256M,share=on -kernel "$kernel/vmlinuz" -initrd "$work/initrd" \
        -append "console=ttyS0 quiet panic=-1 no_timer_check random.trust_cpu=on" \
        -chardev "socket,id=c0,path=$work/disk.sock" -device vhost-user-blk-pci,chardev=c0 </dev/null >"$work/qemu.log" 2>&1 ||
        true
    kill -TERM "$backend"
    wait "$backend" || true
    grep -q '^demo: finished' <(tr -d '\r' <"$work/console") || {
        cat "$work/qemu.log" >&2
        tail -n 20 "$work/console" >&2
        die "the guest did not finish"
    }
    tr -d '\r' <"$work/console" | sed -n 's/^demo: said /    guest: /p'
    compare_checksum "$work"
    sed -n 's/.*statistics: \(.*\) errors=\([0-9]*\).*/    backend: \1 errors=\2/p' "$work/backend.log" |
        sed -E 's/(flush_us|kicks|doorbells).*( errors)/…\2/' | cut -c 1-120
}

# act TITLE LINE…
act() {
    printf '\n%s\n' "$1"
    shift
    printf '    %s\n' "$@"
}

# compare_checksum WORK: compares the file that the guest has written with the file in the image of the drive.
compare_checksum() {
    local wanted found
    wanted=$(tr -d '\r' <"$1/console" | sed -n 's/^demo: said sha256 of the file: \([0-9a-f]*\)$/\1/p')
    debugfs -R "dump /file $1/file" "$1/disk.img" 2>/dev/null
    found=$(sha256sum "$1/file" | cut -d ' ' -f 1)
    printf '    host:  sha256 in the image: %s\n' "$found"
    [[ -n $wanted && $found == "$wanted" ]] || die "the guest's checksum was '$wanted', the drive's image has '$found'"
}

# make_initrd KERNEL WORK: a guest with busybox, mkfs.ext4 and the kernel's modules.
make_initrd() {
    local root=$2/guest
    place_base "$root"
    place_programs "$root" "$(command -v mkfs.ext4)"
    mkdir -p "$root/etc" "$root/modules"
    cp /etc/mke2fs.conf "$root/etc/"
    cp "$1"/modules/* "$root/modules/"
    cp "$TESTBED_DIR/demo/guest-init" "$root/init"
    archive "$root" >"$2/initrd"
    rm -rf "$root"
}
