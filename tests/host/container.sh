#!/bin/sh
# profiles: vtd debian
# minutes: 0.5
# boot: iommu
# options: --add target/container:/testbed/container --add /usr/bin/crun
# The root file system of the image under a real OCI runtime (crun): a user without rights, and of the host's devices only those
# that `cdi` names. A virtual machine outside the container uses the disk. On Debian's own kernel by VFIO type1.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

BUNDLE=/run/bundle USER_ID=65532 SOCKETS=/run/sockets
SOCKET=$SOCKETS/disk.sock
UNLIMITED=18446744073709551615 # RLIM_INFINITY

# joined SEPARATOR: the lines of standard input in one.
joined() { paste -s -d "$1" -; }
# node PATH: it as an element of linux.devices. rule PATH: it as a rule of its control group.
node() {
    printf '{"path":"%s","type":"c","major":%d,"minor":%d,"uid":%d,"gid":%d,"fileMode":384}\n' "$1" \
        "0x$(stat -c %t "$1")" "0x$(stat -c %T "$1")" "$USER_ID" "$USER_ID"
}
rule() {
    printf '{"allow":true,"type":"c","major":%d,"minor":%d,"access":"rw"}\n' "0x$(stat -c %t "$1")" "0x$(stat -c %T "$1")"
}

# bundle LIMIT NODES ALLOWED: a container with RLIMIT_MEMLOCK of LIMIT bytes and with the NODES, which may open those of ALLOWED.
bundle() {
    mkdir -p "$BUNDLE" "$SOCKETS" && chown "$USER_ID" "$SOCKETS"
    rm -f "$SOCKET"
    {
        cat <<END
{ "ociVersion": "1.0.2",
  "process": {
    "user": { "uid": $USER_ID, "gid": $USER_ID }, "cwd": "/", "env": ["PATH=/usr/bin"], "noNewPrivileges": true,
    "args": ["/usr/bin/vhost-device-vfio", "--socket-path", "/run/vhost-device-vfio/disk.sock", "--device", "$FUNCTION",
             "--queues", "2"],
    "capabilities": { "bounding": [], "effective": [], "permitted": [], "inheritable": [], "ambient": [] },
    "rlimits": [{ "type": "RLIMIT_MEMLOCK", "soft": $1, "hard": $1 }] },
  "root": { "path": "/testbed/container", "readonly": true },
  "mounts": [
    { "destination": "/proc", "type": "proc", "source": "proc" },
    { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"] },
    { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
    { "destination": "/run/vhost-device-vfio", "type": "bind", "source": "$SOCKETS", "options": ["rbind", "rw"] }],
  "linux": {
    "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "network" },
                   { "type": "cgroup" }],
    "cgroupsPath": "/disk",
    "devices": [$(for path in $2; do node "$path"; done | joined ,)],
    "resources": { "devices": [{ "allow": false, "access": "rwm" }$(for path in $3; do echo ",$(rule "$path")"; done)] } } }
END
    } >"$BUNDLE/config.json"
}
crun_() { crun --root /run/crun --cgroup-manager cgroupfs "$@"; }
# --no-pivot: the host's root file system is its initramfs, which pivot_root(2) refuses.
start() {
    rm -f "$BACKEND_STATUS"
    : >"$BACKEND_LOG"
    (
        status=0
        crun_ run --no-pivot --bundle "$BUNDLE" disk >"$BACKEND_LOG" 2>&1 </dev/null || status=$?
        echo "$status" >"$BACKEND_STATUS"
    ) &
}

described() {
    vhost-device-vfio cdi "$FUNCTION" >/run/cdi.json
    grep -q '"cdiVersion": "0.5.0"' /run/cdi.json
    grep -q "\"name\": \"$FUNCTION\"" /run/cdi.json
    sed -n 's/.*"path": "\(.*\)".*/\1/p' /run/cdi.json >/run/nodes
    at=/sys/bus/pci/devices/$FUNCTION
    case $PROFILE in
    debian) printf '%s\n' /dev/vfio/vfio "/dev/vfio/$(basename "$(readlink "$at/iommu_group")")" ;;
    *) printf '%s\n' /dev/iommu "/dev/vfio/devices/$(ls "$at/vfio-dev")" ;;
    esac >/run/wanted
    equal "$(cat /run/wanted)" "$(cat /run/nodes)" "device nodes"
}
not_described() {
    if vhost-device-vfio cdi 0000:00:00.0 2>/run/said; then return 1; fi
    grep -q 'bound to .*, must be bound to vfio-pci' /run/said
}

container_pid() { crun_ state disk | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p'; }
serves() {
    bundle "$UNLIMITED" "$(cat /run/nodes)" "$(cat /run/nodes)"
    start
    within 30 logged 'serving '
    container_pid >"$BACKEND_PID"
}
confined() {
    at=/proc/$(cat "$BACKEND_PID")
    equal "$USER_ID $USER_ID" "$(awk '/^Uid:/ { print $2, $3 }' "$at/status")" "user"
    equal 0000000000000000 "$(awk '/^CapBnd:/ { print $2 }' "$at/status")" "capabilities"
    equal 1 "$(awk '/^NoNewPrivs:/ { print $2 }' "$at/status")" "no_new_privs"
    # The runtime's own are memory devices, terminals and what refers to them.
    (cd "$at/root" && find dev -type c) | grep -vE '^dev/(null|zero|full|random|urandom|tty|console|ptmx|pts/.*)$' |
        sort >/run/found
    sort /run/nodes | sed 's/^.//' >/run/wanted
    equal "$(cat /run/wanted)" "$(cat /run/found)" "devices in the container"
    [ ! -e "$at/root/bin/sh" ]
}
guest_uses_it() {
    guest_start --queues 2 --smp 2 --mem 160M --hugepages
    guest exec -- 'dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
        dd if=/tmp/data of=/dev/vda bs=256k seek=128 oflag=direct 2>/dev/null && sync && sha256sum </tmp/data' >/run/sum
    equal "$(cat /run/sum)" \
        "$(guest exec -- 'dd if=/dev/vda bs=256k skip=128 count=32 iflag=direct 2>/dev/null | sha256sum')" "data"
    verify --size=8M
    [ "$(pinned)" -ge 163840 ]
    guest stop
}
ends() {
    crun_ kill disk TERM
    within 20 test -s "$BACKEND_STATUS"
    equal 0 "$(cat "$BACKEND_STATUS")" "exit status"
    equal 0 "$(statistic errors)" "errors"
    bind_to_nvme "$FUNCTION"
    dd if="$(block_device "$FUNCTION")" bs=256k skip=128 count=32 2>/dev/null | sha256sum >/run/on-drive
    bind_to_vfio "$FUNCTION"
    equal "$(cat /run/sum)" "$(cat /run/on-drive)" "data on the drive"
}

# refused PATTERN LIMIT NODES ALLOWED: such a container ends with a message that matches.
refused() {
    pattern=$1
    shift
    bundle "$@"
    start
    within 30 test -s "$BACKEND_STATUS" || { crun_ delete --force disk && return 1; }
    [ "$(cat "$BACKEND_STATUS")" != 0 ]
    logged "$pattern"
}
without() { grep -vxF "$1" /run/nodes; }

grep -q ' cgroup2 ' /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit
claim "cdi names the two device nodes of the function, and no other" described
claim "a function that is not bound to vfio-pci is not described, and the reason is given" not_described
claim "the container serves" serves
claim "without root, without capabilities, with these two devices" confined
claim "a virtual machine outside the container writes, reads and verifies" guest_uses_it
claim "the container ends well, and the data are on the drive" ends

ALL=$(cat /run/nodes) FIRST=$(head -n 1 /run/nodes) SECOND=$(tail -n 1 /run/nodes)
claim "too little lockable memory: the limit, and how to raise it" \
    refused 'RLIMIT_MEMLOCK allows 64 KiB.*--ulimit memlock=-1:-1' 65536 "$ALL" "$ALL"
for path in "$FIRST" "$SECOND"; do
    claim "$path missing: its name, and the option" \
        refused "$path: No such file.*container needs --device.* $path" "$UNLIMITED" "$(without "$path")" "$ALL"
    claim "$path forbidden by the control group: its name, and the rule" \
        refused "$path: Operation not permitted.*control group.*DeviceAllow=$path rw" "$UNLIMITED" "$ALL" "$(without "$path")"
done
finished
