#!/bin/sh
# own_systemd.sh start WORK PROGRAM UNIT…: runs this machine's systemd as process 1 of its own namespaces.
# It needs root. The rest of the machine is not changed, whether systemd runs there or not.
#
#   WORK/run   its /run, which is also the way to the sockets there
#   WORK/pid   its process; `nsenter --target PID --mount --pid systemctl …` talks to it, `kill -9 PID` ends all of it
#
# It knows only the units, WORK/drop-in.conf as the drop-in of services, and empty targets. PROGRAM is copied to /usr/local/bin.
set -eu

# In a mount namespace of its own.
start() {
    work=$1 cgroups=$1/cgroups
    # Whatever runs inside can change no file but those in WORK.
    mount --bind "$work" "$work"
    mount -o remount,bind,ro /
    mkdir "$cgroups"
    mount -t cgroup2 cgroup2 "$cgroups"
    own=$cgroups$(sed -n 's/^0:://p' /proc/self/cgroup)/own-systemd-$$
    mkdir "$own"
    (
        echo 0 >"$own/cgroup.procs"
        # The first process that the shell starts is process 1.
        # shellcheck disable=SC2016 # for the shell inside
        exec unshare --mount --pid --cgroup --ipc --uts sh -c 'sh "$0" first "$@" & echo $! >"$1/pid"; wait' "$0" "$@"
    ) || true
    find "$own" -depth -type d -exec rmdir {} +
    umount "$cgroups"
}

first() {
    work=$1 program=$2
    shift 2
    mount -t proc proc /proc
    # It sets limits of the kernel at its start.
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys
    umount -R /sys/fs/cgroup 2>/dev/null || true
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # It creates a machine-id.
    mkdir "$work/etc"
    cp /etc/passwd /etc/group /etc/ld.so.cache "$work/etc/"
    # The group that the socket belongs to.
    grep -q '^vhost-device-vfio:' "$work/etc/group" || echo 'vhost-device-vfio:x:64000:' >>"$work/etc/group"
    echo 0123456789abcdef0123456789abcdef >"$work/etc/machine-id"
    mount --bind "$work/etc" /etc
    mount -t tmpfs tmpfs /usr/local/bin
    cp "$program" /usr/local/bin/
    mkdir -p "$work/run/units" "$work/run/generators"
    for unit; do
        cp "$unit" "$work/run/units/"
        mkdir "$work/run/units/${unit##*/}.d"
        case $unit in *.service) cp "$work/drop-in.conf" "$work/run/units/${unit##*/}.d/" ;; esac
    done
    for target in basic default shutdown sockets sysinit; do
        printf '[Unit]\nDescription=Nothing\nDefaultDependencies=no\n' >"$work/run/units/$target.target"
    done
    mount --bind "$work/run" /run
    # Last, because WORK may be there.
    mount -t tmpfs tmpfs /tmp
    # `container`: the devices and the clock are not its own.
    exec env -i PATH="$PATH" container=other SYSTEMD_LOG_TARGET=null \
        SYSTEMD_UNIT_PATH=/run/units SYSTEMD_GENERATOR_PATH=/run/generators /lib/systemd/systemd --system --show-status=no
}

case $1 in
start)
    shift
    start "$@"
    ;;
first)
    shift
    first "$@"
    ;;
esac
