#!/bin/sh
# profiles: vtd
# minutes: 1
# options: --guest-kernel trixie-backports --add target/alioth
# Alioth, a VMM for KVM that shares no code with this project or with QEMU, is the front-end of a disk: its guest writes, reads and
# verifies on both virtqueues, and the host finds the data on the drive. Alioth starts packed rings with the base of split ones, so
# it needs --rings split. The front-end is what differs from other tests, so one kind of IOMMU is enough.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

CONSOLE=/run/alioth.log
ALIOTH_PID=/run/alioth.pid

# The guest has no port for an agent, so its first process is the test, and the console has what it found.
make_guest() {
    mkdir -p /run/image
    cat >/run/image/init <<'END'
#!/bin/sh
export PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
while read -r module; do insmod "/modules/$module"; done </modules/order
n=0
until [ -b /dev/vda ] || [ $n -ge 100 ]; do n=$((n + 1)) && usleep 100000; done
echo "guest: $(cat /sys/block/vda/size) sectors, $(ls /sys/block/vda/mq | wc -l) queues, serial $(cat /sys/block/vda/serial)"
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=256k seek=128 oflag=direct 2>/dev/null && sync
echo "guest: wrote $(sha256sum </tmp/data | cut -c 1-64)"
echo "guest: read $(dd if=/dev/vda bs=256k skip=128 count=32 iflag=direct 2>/dev/null | sha256sum | cut -c 1-64)"
for cpu in 0 1; do
    taskset $((cpu + 1)) fio --name=verify --filename=/dev/vda --direct=1 --rw=randrw --bsrange=512-256k --blockalign=512 \
        --offset=$((cpu * 8))M --size=8M --iodepth=16 --ioengine=io_uring --verify=crc32c --verify_fatal=1 \
        --eta=never --output=/tmp/fio.$cpu &&
        echo "guest: processor $cpu verified"
done
echo "guest: $(dmesg | grep -ciE 'i/o error') errors in all"
while :; do sleep 1; done
END
    chmod +x /run/image/init
    cp -r /testbed/debian-kernel/modules /run/image/
    { cat /testbed/guest.cpio && cd /run/image && find . | cpio -o -H newc 2>/dev/null; } >/run/initrd
}

# alioth_starts: boots the guest. Alioth wants a terminal as its standard input.
alioth_starts() {
    : >"$CONSOLE"
    RUST_LOG=alioth::virtio=debug alioth boot --kernel /testbed/debian-kernel/vmlinuz --initramfs /run/initrd \
        --memory size=192M,backend=memfd --cpu count=2 --blk "vu,socket=$SOCKET" \
        --cmdline 'console=ttyS0 quiet panic=-1 random.trust_cpu=on lapic=notscdeadline loop.max_loop=0' \
        </dev/ttyS0 >"$CONSOLE" 2>&1 &
    echo $! >"$ALIOTH_PID"
}
alioth_ends() {
    kill -9 "$(cat "$ALIOTH_PID")"
    within 20 logged 'it has left'
}
said() { tr -d '\r' <"$CONSOLE" | sed -n "s/.*guest: $1/\\1/p"; }
# shown PATTERN SECONDS: the guest says so in time.
shown() { within "$2" grep -q "guest: $1" "$CONSOLE" || { tail -n 40 "$CONSOLE" && tail -n 5 "$BACKEND_LOG" && return 1; }; }

boots() {
    make_guest
    backend_start --queues 2 --rings split
    alioth_starts
    shown '524288 sectors, 2 queues, serial testbed' 240
}
data_are_read_back() {
    shown 'read ' 120
    equal "$(said 'wrote \(.*\)')" "$(said 'read \(.*\)')" "what the guest reads"
}
both_queues_verify() {
    shown 'processor 0 verified' 200
    shown 'processor 1 verified' 200
    shown '0 errors in all' 20
}
data_are_on_the_drive() {
    alioth_ends
    backend_stop
    equal 0 "$(statistic errors)" "errors"
    bind_to_nvme "$FUNCTION"
    equal "$(said 'wrote \(.*\)')" \
        "$(dd if="$(block_device "$FUNCTION")" bs=256k skip=128 count=32 2>/dev/null | sha256sum | cut -c 1-64)" "data on the drive"
    bind_to_vfio "$FUNCTION"
}
claim "Alioth boots a guest that sees the disk" boots
claim "what the guest writes, it reads back" data_are_read_back
claim "requests of both processors verify" both_queues_verify
claim "the data are on the drive when Alioth is gone" data_are_on_the_drive
finished
