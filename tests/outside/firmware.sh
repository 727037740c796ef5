#!/usr/bin/env bash
# minutes: 1.5
# Two disks of two processes in one virtual machine, which QEMU gives no kernel: OVMF boots Linux, and SeaBIOS runs the boot sector,
# from the disk that comes first by its bootindex. Under TCG, without root but to install packages.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh
# shellcheck source=tests/testbed/debian_kernel.sh
. "$TESTBED_DIR/debian_kernel.sh"

WORK=$(mktemp -d)
# Offset of the only partition, in bytes.
readonly PARTITION=1048576

trap clean_up EXIT

# The guest says which disk it was booted from, by its kernel's arguments, and which disks it sees.
make_initrd() {
    local root=$WORK/guest
    place_base "$root"
    mkdir -p "$root/modules"
    cp "$KERNEL"/modules/* "$root/modules/"
    cat >"$root/init" <<'END'
#!/bin/sh
export PATH=/bin:/usr/bin:/usr/sbin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
n=0
until [ -e /sys/block/vdb/serial ] || [ $n -ge 100 ]; do n=$((n + 1)) && usleep 100000; done
echo "booted from $(sed 's/.*booted=//; s/ .*//' /proc/cmdline), sees $(cat /sys/block/vd?/serial | tr '\n' ' ')"
[ ! -d /sys/firmware/efi ] || echo "by UEFI"
poweroff -f
END
    chmod +x "$root/init"
    archive "$root" >"$WORK/initrd"
}

# boot_sector NAME: code that SeaBIOS runs, which is loaded to 0x7c00. It sends a line to the first serial port, and resets.
boot_sector() {
    # cld; ds = 0; si = 0x7c25: for each byte there, wait for bit 5 of port 0x3fd, and send it to port 0x3f8 …
    printf '\xfc\x31\xc0\x8e\xd8\xbe\x25\x7c\xac\x84\xc0\x74\x11\x88\xc4\xba\xfd\x03\xec\xa8\x20\x74\xfb\x88\xe0\xb2\xf8\xee\xeb\xea'
    # … and at a zero the keyboard controller's reset; hlt.
    printf '\xb0\xfe\xe6\x64\xf4\xeb\xfd'
    printf 'boot sector of %s\n\0' "$1"
}

# make_disk NAME: a boot sector for SeaBIOS, and one partition that OVMF can boot.
make_disk() {
    local image=$WORK/$1.img partition=$WORK/$1.img@@$PARTITION
    truncate -s 128M "$image"
    echo 'start=1MiB, type=ef, bootable' | sfdisk --quiet --label dos "$image"
    mkfs.vfat -F 16 --offset $((PARTITION / 512)) -h 2048 -g 255/63 "$image" $((127 * 1024)) >/dev/null
    boot_sector "$1" | dd of="$image" conv=notrunc status=none
    printf '%s\n' 'DEFAULT linux' 'LABEL linux' 'KERNEL /vmlinuz' 'INITRD /initrd' \
        "APPEND console=ttyS0 quiet panic=-1 no_timer_check booted=$1" >"$WORK/syslinux.cfg"
    mmd -i "$partition" ::/EFI ::/EFI/BOOT
    mcopy -i "$partition" "$KERNEL/vmlinuz" "$WORK/initrd" "$WORK/syslinux.cfg" ::/
    mcopy -i "$partition" /usr/lib/SYSLINUX.EFI/efi64/syslinux.efi ::/EFI/BOOT/BOOTX64.EFI
    mcopy -i "$partition" /usr/lib/syslinux/modules/efi64/ldlinux.e64 ::/EFI/BOOT/
}

two_processes_serve() {
    make_initrd
    for disk in one two; do make_disk "$disk"; done
    for disk in one two; do serve "$disk" --device "emulated:file=$WORK/$disk.img,serial=$disk" --queues 1; done
}

# boots FIRST SECOND [QEMU OPTION…]: boots FIRST.
boots() {
    local first=$1 second=$2
    shift 2
    timeout --kill-after=5 170 qemu-system-x86_64 -M q35,memory-backend=mem -accel tcg -cpu max -m 512M -nodefaults \
        -display none -no-reboot -serial "file:$WORK/console" -object memory-backend-memfd,id=mem,size=512M,share=on "$@" \
        -chardev "socket,id=one,path=$WORK/one.sock" -chardev "socket,id=two,path=$WORK/two.sock" \
        -device "vhost-user-blk-pci,chardev=$first,bootindex=1" -device "vhost-user-blk-pci,chardev=$second,bootindex=2" \
        </dev/null >"$WORK/qemu.log" 2>&1 || cat "$WORK/qemu.log"
    tr -d '\r' <"$WORK/console" >"$WORK/said"
}
boots_by_bios() {
    boots "$@"
    equal "boot sector of $1" "$(cat "$WORK/said")" "what has run"
}
boots_by_uefi() {
    cp /usr/share/OVMF/OVMF_VARS_4M.fd "$WORK/vars"
    boots "$@" -drive if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd \
        -drive "if=pflash,unit=1,format=raw,file=$WORK/vars"
    contains "booted from $1, sees " "$WORK/said"
    contains "$1" <(sed -n 's/.*, sees //p' "$WORK/said")
    contains "$2" <(sed -n 's/.*, sees //p' "$WORK/said")
    contains 'by UEFI' "$WORK/said"
}

need_image_programs
need /usr/share/OVMF/OVMF_CODE_4M.fd=ovmf /usr/lib/syslinux/modules/efi64/ldlinux.e64=syslinux-common \
    /usr/lib/SYSLINUX.EFI/efi64/syslinux.efi=syslinux-efi mcopy=mtools mkfs.vfat=dosfstools sfdisk=fdisk
KERNEL=$(debian_kernel)
claim "two processes serve two disks that can be booted" two_processes_serve
((BROKEN == 0)) || finished
claim "SeaBIOS runs the boot sector of the first by bootindex" boots_by_bios one two
claim "SeaBIOS runs the other's if that is the first" boots_by_bios two one
claim "OVMF boots Linux from the first by bootindex" boots_by_uefi one two
claim "OVMF boots from the other if that is the first" boots_by_uefi two one
finished
