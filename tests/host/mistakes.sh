#!/bin/sh
# profiles: vtd
# minutes: 0.2
# boot: plain
# options: --qemu-arg -device --qemu-arg edu,addr=6 --qemu-arg -drive --qemu-arg if=none,id=own,format=raw,file.driver=null-co,file.size=64M --qemu-arg -device --qemu-arg edu,addr=7,multifunction=on --qemu-arg -device --qemu-arg nvme,serial=own,drive=own,addr=7.1
# Mistakes of a first-time user, and the program's error messages: the object, the cause, the fix.

# shellcheck source=tests/host/lib.sh
. /testbed/tests/lib.sh

EDU=0000:00:06.0

# answers PATTERN COMMAND…: COMMAND fails with a message that matches.
answers() {
    pattern=$1
    shift
    if "$@" >/run/answer 2>&1; then echo "succeeded" && return 1; fi
    grep -qE -e "$pattern" /run/answer || {
        echo "wanted: $pattern; found:"
        cat /run/answer
        return 1
    }
}
serve() { timeout 30 vhost-device-vfio --socket-path "${2:-/run/other.sock}" --device "$1"; }

no_iommufd() {
    mv /dev/iommu /dev/iommu.away
    status=0
    answers '/dev/iommu: No such file.*not passed in here' \
        timeout 30 vhost-device-vfio --socket-path /run/other.sock --device "$FUNCTION" --iommu iommufd || status=$?
    mv /dev/iommu.away /dev/iommu
    return "$status"
}
no_interface() {
    mv /dev/iommu /dev/iommu.away
    mv /dev/vfio/vfio /dev/vfio/vfio.away
    status=0
    answers '/dev/iommu: No such file.*; nor can it be used by VFIO type1: /dev/vfio/vfio: No such file.*--device /dev/vfio/vfio' \
        serve "$FUNCTION" || status=$?
    mv /dev/vfio/vfio.away /dev/vfio/vfio
    mv /dev/iommu.away /dev/iommu
    return "$status"
}
not_nvme() {
    bind_to_vfio "$EDU"
    answers "$EDU: .*(NVMe|NVM Express)" serve "$EDU"
}
# Two functions of one slot are one group; the kernel's nvme driver holds the second.
group_not_viable() {
    bind_to_vfio 0000:00:07.0
    answers 'IOMMU group [0-9]+ is not viable: 0000:00:07.1 \(nvme\)' serve 0000:00:07.0
}
socket_taken() { answers "$SOCKET.*in use" timeout 30 vhost-device-vfio --socket-path "$SOCKET" --device "$EDU"; }
# QEMU sends no region for memory without a file. For a file that it has mapped privately, it does up to version 10. The
# firmware's own read of the disk is enough to cause the error.
private_memory() {
    before=$(times_logged 'share=on' || true)
    qemu-system-x86_64 -machine q35,memory-backend=ram -accel kvm -m 64M -nodefaults -no-user-config -display none \
        -object "$1,id=ram,size=64M" -chardev "socket,id=vhost0,path=$SOCKET" \
        -device vhost-user-blk-pci,chardev=vhost0 </dev/null >/run/qemu.log 2>&1 &
    vm=$!
    status=0
    within 20 logged_more_than "$before" '(shared no memory|mapped this memory privately).*share=on' || status=$?
    kill -9 "$vm"
    grep -E 'protocol |share=on' "$BACKEND_LOG" | tail -n 3
    return "$status"
}
# Enough for the driver's own queues, not for the guest's memory.
lockable_memory() {
    backend_stop
    chmod 666 /dev/iommu /dev/vfio/devices/*
    mkdir -p /run/nobody && chown 65534 /run/nobody
    echo 'nobody:x:65534:65534::/run/nobody:/bin/sh' >>/etc/passwd
    answers 'KiB must be locked, RLIMIT_MEMLOCK allows 64 KiB.*ulimit -l' su nobody -c \
        "ulimit -l 64; PATH=$PATH LD_LIBRARY_PATH=$LD_LIBRARY_PATH timeout 30 vhost-device-vfio --socket-path /run/nobody/s --device $FUNCTION"
}

# doctor OUTCOME PATTERN [FUNCTION]: its line, and its exit status if that is a problem.
doctor() {
    status=0
    # shellcheck disable=SC2086 # no function, no argument
    vhost-device-vfio doctor ${3-} >/run/answer 2>&1 || status=$?
    { grep -qE -e "^$1 +$2" /run/answer && { [ "$1" != PROBLEM ] || [ "$status" = 1 ]; }; } || {
        echo "wanted: $1 $2; status $status; found:"
        cat /run/answer
        return 1
    }
}
doctor_without() {
    mv "$1" "$1.away"
    status=0
    doctor "$2" "$3" || status=$?
    mv "$1.away" "$1"
    return "$status"
}
doctor_is_content() {
    vhost-device-vfio doctor "$FUNCTION" >/run/answer 2>&1 || { cat /run/answer && return 1; }
    grep -qE '^ok +acquire +through iommufd.*DMA is' /run/answer
}
doctor_json() { vhost-device-vfio doctor --json "$FUNCTION" | grep -qE '"passed":false.*"check":"binding","outcome":"problem"'; }

bind_to_nvme "$FUNCTION" || exit
claim "doctor: a function bound to another driver, and the command that binds it" \
    doctor PROBLEM "binding.*bound to nvme, must be bound to vfio-pci.*driverctl" "$FUNCTION"
claim "doctor: the same as JSON" doctor_json
claim "doctor: without a function, those that could be served" doctor note "function.*NVMe drives: .*$FUNCTION \\(nvme\\)"
claim "a function bound to another driver: the command that binds it to vfio-pci" \
    answers "bound to nvme, must be bound to vfio-pci.*driverctl set-override $FUNCTION" serve "$FUNCTION"
bind_to_vfio "$FUNCTION"
claim "a function without a driver: the command that binds it" answers 'bound to no driver' serve "$EDU"
claim "an address without a function: the address" answers '0000:1f:00.0: no such PCI function' serve 1f:00.0
claim "a word that is not an address: an example" answers 'not a PCI address.*0000:00:04.0' serve nvme0
claim "doctor: nothing is missing, and the verdict" doctor_is_content
claim "doctor: the kernel, the IOMMU and interrupt remapping of this host are found" doctor ok 'iommu.*groups behind dmar'
claim "doctor: what the kernel has of the sandbox" doctor ok 'sandbox +complete, so --sandbox strict can be used'
claim "doctor: no /dev/iommu, so type1 is used" doctor_without /dev/iommu note 'interface.*type1 is used, because /dev/iommu'
claim "doctor: an address without a function" doctor PROBLEM 'function.*there is no function 0000:1f:00.0' 1f:00.0
claim "no /dev/iommu: what is missing" no_iommufd
claim "neither /dev/iommu nor /dev/vfio/vfio: what is missing of each" no_interface
claim "a function that is not an NVMe controller: its class" not_nvme
claim "a group that is not viable: the other function, with its driver" group_not_viable
claim "doctor: a group that is not viable, with the other function" \
    doctor PROBLEM 'group.*not viable: the host uses 0000:00:07.1 \(nvme\)' 0000:00:07.0
claim "a namespace that does not exist: those that do" answers 'namespace 9.*it has: 1' \
    timeout 30 vhost-device-vfio --socket-path /run/other.sock --device "$FUNCTION" --namespace 9
claim "a socket path that is too long: the longest possible" answers 107 serve "$FUNCTION" "/run/$(printf '%0200d' 0)"
backend_start || exit
claim "doctor: a function in use, and its process" doctor PROBLEM "acquire.*in use by process [0-9]+ \\(vhost-device" "$FUNCTION"
claim "a function in use: its process" answers "in use by process [0-9]+ \\(vhost-device" serve "$FUNCTION"
claim "a socket in use: it is not replaced" socket_taken
claim "memory without a file: the fix, in the log" private_memory memory-backend-ram
claim "memory in a file that is not shared: the fix, in the log" private_memory memory-backend-memfd,share=off
claim "too little lockable memory: how much is needed, how much is allowed, the fix" lockable_memory
finished
