#!/usr/bin/env bash
# minutes: 0.7
# The emulated drive in stock QEMU under TCG, directly on this machine, without root, KVM or the emulated host. First as a disk,
# then as a whole function, which needs a newer QEMU than most machines have.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

WORK=$(mktemp -d)
SOCKET=$WORK/backend.sock
DISK=$WORK/disk.img
trap clean_up EXIT
# shellcheck source=tests/testbed/native_guest.sh
. "$TESTBED_DIR/native_guest.sh"

# backend_start OPTIONS: serves an emulated drive with these options.
backend_start() { serve backend --device "emulated:$1" --queues 2; }

# guest_start [OPTION of "guest start"]…
guest_start() { guest start --socket "$SOCKET" --queues 2 --mem 256M --timeout 180 "$@"; }

# The first discard enlarges the disk by one half.
starts() {
    printf '%s\n' '[[fault]]' 'effect = "resize"' 'size = "96M"' 'queue = 1' 'opcode = "dataset-management"' >"$WORK/grow.toml"
    backend_start "file=$DISK,create=on,size=64M,faults=$WORK/grow.toml"
    guest_start --allow-reset --qemu-arg -m --qemu-arg slots=2,maxmem=1G
    contains 'DMA is coherent: the IOMMU enforces snooping' "$WORK/backend.log"
}
capacity() { equal 131072 "$(guest exec -- 'cat /sys/block/vda/size')" "sectors"; }
data_get_out() {
    guest exec -- 'dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
        dd if=/tmp/data of=/dev/vda bs=256k seek=16 oflag=direct 2>/dev/null && sync && sha256sum </tmp/data' >"$WORK/sum"
    equal "$(cat "$WORK/sum")" "$(dd if="$DISK" bs=1M skip=4 count=8 status=none | sha256sum)" "the file behind the drive"
}
data_are_there() {
    equal "$(cat "$WORK/sum")" \
        "$(guest exec -- 'dd if=/dev/vda bs=256k skip=16 count=32 iflag=direct 2>/dev/null | sha256sum')" "the data read back"
}
has_grown() { [[ $(guest exec -- 'cat /sys/block/vda/size') = 196608 ]]; }
grows() {
    guest exec -- 'blkdiscard -o 62914560 -l 65536 /dev/vda'
    within 20 has_grown
    guest exec -- 'dd if=/tmp/data of=/dev/vda bs=256k seek=320 oflag=direct 2>/dev/null && sync'
    equal "$(cat "$WORK/sum")" "$(dd if="$DISK" bs=1M skip=80 count=8 status=none | sha256sum)" "the file behind the drive"
}
fio_verifies() {
    guest exec --timeout 200 -- 'fio --name=verify --filename=/dev/vda --offset=32M --size=8M --rw=randrw --bs=4k-64k \
        --direct=1 --ioengine=io_uring --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 >/dev/null'
}
file_system() {
    guest exec --timeout 200 -- 'dd if=/dev/zero of=/dev/vda bs=1M count=1 2>/dev/null; mkfs.ext4 -qF /dev/vda 3M &&
        mount /dev/vda /mnt && echo kept >/mnt/file && umount /mnt && e2fsck -fn /dev/vda >/dev/null'
}
memory_grows() {
    guest qmp object-add '{"qom-type":"memory-backend-memfd","id":"more","size":134217728,"share":true}'
    guest qmp device_add '{"driver":"pc-dimm","id":"dimm","memdev":"more"}'
    within 20 grep -q 'region 0x100000000+128M' "$WORK/backend.log"
    data_are_there
}
reset_and_back() {
    guest qmp system_reset
    guest ready --timeout 180
    data_are_there
}
killed_and_back() {
    guest exec -- 'dd if=/dev/vda of=/dev/null bs=4k iflag=direct & sleep 0.2'
    guest kill
    within 20 grep -q 'it has left' "$WORK/backend.log"
    guest_start
    data_are_there
    guest exec -- 'mount -o ro /dev/vda /mnt && grep -q kept /mnt/file'
}
ends() {
    guest stop
    stop backend
    contains 'errors=0 ' "$WORK/backend.log"
    lacks 'ERROR' "$WORK/backend.log"
}

prepare_guest
claim "a guest boots with an emulated drive" starts
claim "the guest sees its size" capacity
claim "what the guest writes is in the file behind the drive" data_get_out
claim "the guest sees the new size of a drive that grows, and the new blocks store data" grows
claim "fio in the guest verifies" fio_verifies
claim "the guest makes a file system and it is clean" file_system
claim "memory is added while the guest runs" memory_grows
claim "the data survive a reset of the guest" reset_and_back
claim "the data survive when QEMU is killed during I/O" killed_and_back
claim "the backend ends without errors" ends

# A boot sector that reads the next sector through the BIOS and prints its text on the debug port.
#   xor ax,ax; mov ds,ax; mov es,ax; mov ax,0x0201; mov bx,0x7e00; mov cx,2; xor dh,dh; int 0x13
#   mov si,0x7e00; next: lodsb; test al,al; jz end; out 0xe9,al; jmp next; end: hlt; jmp end
boot_disk() {
    truncate -s 1M "$DISK"
    printf '%b' '\x31\xc0\x8e\xd8\x8e\xc0\xb8\x01\x02\xbb\x00\x7e\xb9\x02\x00\x30\xf6\xcd\x13' \
        '\xbe\x00\x7e\xac\x84\xc0\x74\x04\xe6\xe9\xeb\xf7\xf4\xeb\xfd' | dd of="$DISK" conv=notrunc status=none
    printf '\x55\xaa' | dd of="$DISK" bs=1 seek=510 conv=notrunc status=none
    printf 'the second sector' | dd of="$DISK" bs=512 seek=1 conv=notrunc status=none
}
firmware_boots() {
    rm -f "$DISK" && boot_disk
    backend_start "file=$DISK"
    qemu-system-x86_64 -accel tcg -m 64M -nodefaults -no-user-config -display none \
        -object memory-backend-memfd,id=ram,size=64M,share=on -machine q35,memory-backend=ram \
        -chardev "socket,id=disk,path=$SOCKET" -device vhost-user-blk-pci,chardev=disk,bootindex=0 \
        -chardev "file,id=debug,path=$WORK/debug" -device isa-debugcon,iobase=0xe9,chardev=debug >"$WORK/qemu.log" 2>&1 &
    echo $! >"$WORK/qemu.pid"
    within 60 grep -q 'the second sector' "$WORK/debug" || { cat "$WORK/qemu.log" "$WORK/backend.log" && return 1; }
    kill "$(<"$WORK/qemu.pid")"
    stop backend
}
claim "SeaBIOS boots from the drive" firmware_boots

# The whole function: the guest's own nvme driver.
whole_starts() {
    local qemu
    qemu=$("$TESTBED_ROOT/scripts/testbed" qemu trixie-backports) || return
    rm -f "$DISK"
    serve whole --vfio-user --device "emulated:file=$DISK,create=on,size=64M"
    PATH=$WORK/bin:$qemu/bin:$PATH guest start --mem 256M --timeout 180 --qemu-arg -device \
        --qemu-arg "{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"$WORK/whole.sock\"}}"
    guest exec -- 'test -b /dev/nvme0n1'
}
whole_data_get_out() {
    guest exec -- 'dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
        dd if=/tmp/data of=/dev/nvme0n1 bs=256k seek=16 oflag=direct 2>/dev/null && sync && sha256sum </tmp/data' >"$WORK/sum"
    equal "$(cat "$WORK/sum")" "$(dd if="$DISK" bs=1M skip=4 count=8 status=none | sha256sum)" "the file behind the drive"
    guest exec -- 'grep -q nvme0q1 /proc/interrupts'
}
whole_ends() {
    guest stop
    within 20 grep -q 'it has left' "$WORK/whole.log" || { cat "$WORK/whole.log" && return 1; }
    stop whole
    lacks 'ERROR' "$WORK/whole.log"
}
claim "over vfio-user the guest's own nvme driver finds the whole drive" whole_starts
claim "what the guest writes to the whole drive is in the file behind it" whole_data_get_out
claim "the backend of the whole drive ends without errors" whole_ends
finished
