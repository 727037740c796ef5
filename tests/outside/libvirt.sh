#!/usr/bin/env bash
# minutes: 2
# libvirt as the manager of a virtual machine with a disk of this program: the daemon starts it, saves it under a load that checks
# itself, and plugs a second disk in and out, each with the XML of README.md. QEMU runs under TCG with emulated drives.
# The daemon has namespaces of its own and a root file system that it cannot write, so that nothing of this machine changes. Needs
# root.
# shellcheck disable=SC2317 # functions are called by name, through claim
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

if [[ ${1:-} != inside ]]; then
    ((EUID == 0)) || die "libvirt's daemon in its own namespaces needs root; run: sudo scripts/test outside/libvirt"
    need /usr/sbin/libvirtd=libvirt-daemon virsh=libvirt-clients unshare=util-linux
    WORK=$(mktemp -d)
    trap 'rm -rf --one-file-system "$WORK"' EXIT
    # Without a network, so that the daemon can change none. All processes end with the first one.
    unshare --mount --net --ipc --pid --fork --kill-child --mount-proc bash tests/outside/libvirt.sh inside "$WORK"
    exit
fi

WORK=$2
export TMPDIR=$WORK LIBVIRT_DEFAULT_URI=qemu:///system
# shellcheck source=tests/testbed/native_guest.sh
. "$TESTBED_DIR/native_guest.sh"
LIBVIRT_LOG=$WORK/libvirtd.log

# The daemon's directories are empty here, and there is the user as which it runs QEMU.
own_directories() {
    local directory file
    mount --bind "$WORK" "$WORK"
    mount -o remount,bind,ro /
    for directory in /run /etc/libvirt /var; do mount -t tmpfs tmpfs "$directory" || return; done
    # Of this network namespace.
    mount -t sysfs sysfs /sys
    mkdir -p /var/{lib,cache,log,tmp}
    ln -s /run /var/run
    chmod 755 "$WORK"
    cp /etc/passwd /etc/group "$WORK"
    grep -q '^libvirt-qemu:' "$WORK/passwd" || echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false' >>"$WORK/passwd"
    grep -q '^libvirt-qemu:' "$WORK/group" || echo 'libvirt-qemu:x:64055:' >>"$WORK/group"
    for file in passwd group; do mount --bind "$WORK/$file" "/etc/$file" || return; done
    cat >/etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
log_outputs = "2:file:$LIBVIRT_LOG"
host_uuid = "6e1e8a60-5c0a-4f0e-9a5e-0c1d2e3f4a5b"
END
    # stdio_handler: without it a second daemon, virtlogd, must run. cgroup_controllers: this machine need not have any.
    cat >/etc/libvirt/qemu.conf <<'END'
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
END
}

daemon_starts() {
    /usr/sbin/libvirtd </dev/null >"$WORK/libvirtd.out" 2>&1 &
    within 30 virsh uri || { virsh uri; cat "$WORK/libvirtd.out" "$LIBVIRT_LOG" && return 1; }
    virsh version | sed -n 's/^\(Using library\|Running hypervisor\)/# &/p'
}

# serve NAME [ARGUMENT…]: an emulated drive with that serial number, on NAME.sock.
serve() {
    local name=$1
    shift
    "$RELEASE/vhost-device-vfio" --socket-path "$WORK/$name.sock" --queues 2 --control "$WORK/$name.control" \
        --socket-mode 0660 --socket-group libvirt-qemu \
        --device "emulated:file=$WORK/$name.img,create=on,size=64M,serial=$name,latency=200us,order=random" "$@" \
        </dev/null >"$WORK/$name.log" 2>&1 &
    echo $! >"$WORK/$name.pid"
    within 20 listens "$WORK/$name.sock"
}

# element NAME DISK TARGET: an element of the XML in README.md, for that disk.
element() {
    sed -n "/^ *<$1[ >]/,/^ *<\/$1>/p" README.md |
        sed "s|/run/vhost-device-vfio/[^']*\.sock|$WORK/$2.sock|; s/queues='4'/queues='2'/; s/dev='vda'/dev='$3'/; /<boot /d
            s|/usr/lib/vhost-device-vfio/|$WORK/|"
}
# domain [ELEMENT]: the machine's description, with ELEMENT at its end.
domain() {
    cat <<END
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm1</name>
  <memory unit='MiB'>160</memory>
  $(element memoryBacking one vda)
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>$WORK/bzImage</kernel>
    <initrd>$WORK/guest-guest/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 no_timer_check random.trust_cpu=on lapic=notscdeadline loop.max_loop=0</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>$EMULATOR</emulator>
    <controller type='pci' model='pcie-root-port' index='1'/>
    <controller type='pci' model='pcie-root-port' index='2'/>
    <controller type='pci' model='pcie-root-port' index='3'/>
    <controller type='pci' model='pcie-root-port' index='4'/>
    <controller type='pci' model='pcie-root-port' index='5'/>
    <controller type='pci' model='pcie-root-port' index='6'/>
    <controller type='usb' model='none'/>
    $(element disk one vda)
    <serial type='file'><source path='$WORK/guest-guest/console.log'/></serial>
    <channel type='pipe'><source path='$WORK/guest-guest/agent'/><target type='virtio' name='agent'/></channel>
    <memballoon model='virtio'/>
  </devices>
  ${1:-}
</domain>
END
}

# vm COMMAND…: virsh starts the machine or goes on with it, and QEMU's process is found.
vm() {
    virsh "$@" || { tail -n 20 "$LIBVIRT_LOG" /var/log/libvirt/qemu/vm1.log && return 1; }
    cp /run/libvirt/qemu/vm1.pid "$WORK/guest-guest/pid"
}
starts() {
    serve one
    guest files --add stress
    : >"$WORK/guest-guest/qemu.log"
    chown -R libvirt-qemu: "$WORK/guest-guest"
    domain >"$WORK/vm1.xml"
    virsh define --validate "$WORK/vm1.xml"
    vm start vm1
    guest ready --timeout 180
    equal one "$(guest exec -- 'cat /sys/block/vda/serial')" "serial number of the guest's disk"
}

# writes DISK NAME: eight MiB of random data on the guest's disk are in the file behind NAME's drive. reads DISK: they are read.
writes() {
    guest exec -- "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
        dd if=/tmp/data of=/dev/$1 bs=256k seek=16 oflag=direct 2>/dev/null && sync && sha256sum </tmp/data" >"$WORK/$1.sum"
    equal "$(cat "$WORK/$1.sum")" \
        "$(dd if="$WORK/$2.img" bs=1M skip=4 count=8 status=none | sha256sum)" "the file behind the drive"
}
reads() {
    equal "$(cat "$WORK/$1.sum")" \
        "$(guest exec -- "dd if=/dev/$1 bs=256k skip=16 count=32 iflag=direct 2>/dev/null | sha256sum")" "the data read back"
}

load_starts() {
    guest exec -- '(stress /dev/vda --until /tmp/enough --seconds 3000 --threads 32 >/tmp/stress.log 2>&1
            echo $? >/tmp/stressed) >/dev/null 2>&1 &
        until grep -qs "^ended=[1-9]" /tmp/stress.log; do
            [ ! -e /tmp/stressed ] || { cat /tmp/stress.log; exit 1; }; sleep 0.2
        done'
}
progresses() {
    guest exec -- 'n=$(grep -c ^ended= /tmp/stress.log)
        until [ "$(grep -c ^ended= /tmp/stress.log)" -gt $((n + 2)) ]; do [ ! -e /tmp/stressed ] || exit 1; sleep 0.2; done'
}
load_is_right() {
    guest exec --timeout 300 -- ': >/tmp/enough; while [ ! -e /tmp/stressed ]; do sleep 0.5; done
        tail -n 1 /tmp/stress.log; [ "$(cat /tmp/stressed)" = 0 ] && ! dmesg | grep -iE "i/o error|blk_update_request"'
}

plugged() { [[ $(guest exec -- 'cat /sys/block/vdb/serial') == two ]]; }
unplugged() { ! virsh domblklist vm1 | grep -q vdb && guest exec -- '[ ! -e /sys/block/vdb ]'; }
plugs() {
    element disk two vdb >"$WORK/two.xml"
    virsh attach-device vm1 "$WORK/two.xml" --live
    within 30 plugged
}
unplugs() {
    virsh detach-device vm1 "$WORK/two.xml" --live
    within 30 unplugged
    within 10 grep -q 'it has left' "$WORK/two.log"
}
plugged_in_and_out() {
    serve two
    plugs
    writes vdb two
    unplugs
    plugs
    reads vdb
    unplugs
    progresses
}

saved_and_back() {
    for _ in 1 2; do
        virsh managedsave vm1
        equal 'shut off' "$(virsh domstate vm1 | head -n 1)" "the machine's state"
        vm start vm1
        progresses
    done
}
kept_when_off() {
    writes vda one
    guest stop
    within 20 eval '[[ $(virsh domstate vm1 | head -n 1) == "shut off" ]]'
    vm start vm1
    guest ready --timeout 180
    reads vda
}
end_of() {
    kill -TERM "$(<"$WORK/$1.pid")"
    within 20 grep -q 'statistics: ' "$WORK/$1.log"
    contains 'errors=0 ' "$WORK/$1.log"
    lacks 'ERROR' "$WORK/$1.log"
    lacks 'refused: ' "$WORK/$1.log"
}
ends() {
    virsh destroy vm1
    end_of one
    end_of two
}

# allocated: bytes of guest memory that have pages. balloon: the guest gives 40 MiB back that it has used.
allocated() {
    local file
    for file in "/proc/$(guest pid)/fd"/*; do
        [[ $(readlink "$file") != /memfd:* ]] || { echo $((512 * $(stat -L -c %b "$file"))) && return; }
    done
    return 1
}
balloon() {
    guest exec -- 'dd if=/dev/zero of=/tmp/freed bs=1M count=64 2>/dev/null && rm /tmp/freed'
    allocated >"$WORK/allocated"
    virsh setmem vm1 120M --live
    within 30 eval 'virsh dommemstat vm1 | grep -qx "actual 122880"'
}
memory_goes() {
    balloon
    within 10 eval '(($(allocated) <= $(<"$WORK/allocated") - (30 << 20)))'
}
# Under TCG the shim has no KVM to tell. It keeps guest memory all the same.
memory_stays() {
    virsh undefine vm1
    domain "$(element qemu:commandline one vda)" >"$WORK/vm1.xml"
    virsh define --validate "$WORK/vm1.xml"
    serve one --kvm-socket /var/lib/libvirt/qemu/vm1-kvm.sock
    vm start vm1
    guest ready --timeout 180
    contains 'registered: process ' "$WORK/one.log"
    balloon
    (($(allocated) >= $(<"$WORK/allocated")))
    reads vda
}

prepare_guest
EMULATOR=$(command -v qemu-system-x86_64)
# QEMU's user can read only these copies.
cp -L "$GUEST_PARTS/bzImage" "$RELEASE/libkvm_vfio_shim.so" "$WORK"
if [[ -n ${TESTBED_QEMU:-} ]]; then cp -r "$TESTBED_QEMU" "$WORK/qemu" && EMULATOR=$WORK/qemu/bin/qemu-system-x86_64; fi
own_directories || die "the directories of libvirt cannot be replaced in this mount namespace"
claim "libvirt's daemon starts" daemon_starts
((BROKEN == 0)) || finished
claim "it starts a virtual machine with a disk of this program" starts
claim "what the guest writes is in the file behind the drive" writes vda one
claim "a load runs that checks itself" load_starts
claim "a second disk is plugged in, out, and in again, and keeps its data" plugged_in_and_out
claim "the machine is saved twice (managedsave), and goes on with the load" saved_and_back
claim "all data that the load has read are right" load_is_right
claim "the disk keeps its data while the machine is off" kept_when_off
claim "without the shim, a balloon takes memory out of the guest's" memory_goes
claim "the backends end without errors" ends
claim "with the shim, which is preloaded into a QEMU that libvirt confines, memory stays" memory_stays
claim "that backend ends without errors" end_of one
finished
