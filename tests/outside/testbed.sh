#!/usr/bin/env bash
# minutes: 1.8
# scripts/testbed, tested from the machine on which it is started.
set -u

cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/outside/lib.sh
. tests/outside/lib.sh

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
# A failed run leaves its console in TMPDIR.
export TMPDIR=$WORK

# begin NAME…: runs these functions one after another in the background, because they mostly wait. Each may use the files
# $WORK/NAME.*. outcome NAME: waits for a function and returns its status.
begin() {
    local name
    for name; do
        (
            set -e
            "$name"
        ) >"$WORK/$name.said" 2>&1
        echo $? >"$WORK/$name.status"
    done &
}
outcome() {
    within 900 test -s "$WORK/$1.status"
    cat "$WORK/$1.said"
    return "$(<"$WORK/$1.status")"
}

hang() {
    local status=0
    scripts/testbed run --timeout 60 -- sh -c 'echo last words >/dev/console; sleep 100' 2>"$WORK/hang.stderr" || status=$?
    equal 124 "$status" "exit status"
    contains 'last words' "$WORK/hang.stderr"
    contains 'did not end within 60 s' "$WORK/hang.stderr"
}
# A wrapper for QEMU that does not start the processors the first time.
still_once() {
    local real out=$WORK/still_once
    real=$(command -v qemu-system-x86_64)
    mkdir -p "$out.bin"
    cat >"$out.bin/qemu-system-x86_64" <<END
#!/bin/sh
[ "\$1" = -name ] && mkdir "$out.started" 2>/dev/null && exec "$real" "\$@" -S
exec "$real" "\$@"
END
    chmod +x "$out.bin/qemu-system-x86_64"
    PATH=$out.bin:$PATH scripts/testbed run --still-timeout 30 -- uname -s >"$out.stdout" 2>"$out.stderr"
    equal Linux "$(cat "$out.stdout")" stdout
    [[ -d $out.started ]]
    contains 'the host has not started the command; restarting the host' "$out.stderr"
}
still_always() {
    local status=0 out=$WORK/still_always
    scripts/testbed run --still-timeout 1 --qemu-arg -S -- uname -s >"$out.stdout" 2>"$out.stderr" || status=$?
    equal 125 "$status" "exit status"
    equal '' "$(cat "$out.stdout")" stdout
    contains 'the host has not started the command in three attempts' "$out.stderr"
}
# QEMU is stopped by a signal while the command runs.
still_later() {
    local status=0 out=$WORK/still_later
    mkdir "$out"
    (
        within 150 grep -qs begun "$out.stdout"
        pkill -STOP -f "^qemu-system-x86_64 .*$out/testbed"
    ) &
    TMPDIR=$out scripts/testbed run --still-timeout 30 -- sh -c 'echo begun; sleep 300' >"$out.stdout" 2>"$out.stderr" || status=$?
    equal 125 "$status" "exit status"
    contains 'the host hangs (no sign of life for 30 s)' "$out.stderr"
}
begin hang
begin still_once still_later still_always

# One boot for all claims about a run that succeeds.
truncate -s 64M "$WORK/drive.img"
printf 'written outside' | dd of="$WORK/drive.img" conv=notrunc status=none
echo 'a plain file' >"$WORK/plain"
# shellcheck disable=SC2016 # for the shell inside
scripts/testbed run --drive "$WORK/drive.img" --no-bind --mem 2G --smp 1 --timeout 60 --out "$WORK/out" \
    --add "$WORK/plain" --add /usr/bin/od:/usr/local/bin/octal -- sh -c '
    echo "to stdout: it'"'"'s $1"; echo "to stderr" >&2
    cat /proc/cmdline >/dev/console
    dd if=/dev/nvme0n1 bs=15 count=1 2>/dev/null >/out/from-drive
    printf "written inside" | dd of=/dev/nvme0n1 bs=512 seek=8 conv=sync 2>/dev/null
    cat /plain >/out/plain; octal --version >/out/version
    nproc >/out/processors; grep MemTotal /proc/meminfo >/out/memory
    seq 1000 | while read -r n; do echo "line $n"; done >>/out/lines &
    while kill -0 $!; do grep -q "no such line" /out/lines; done 2>/dev/null
    exit 7' - 'a "word"' >"$WORK/stdout" 2>"$WORK/stderr"
STATUS=$?

status_passes() { equal 7 "$STATUS" "exit status"; }
output_apart() {
    equal "to stdout: it's a \"word\"" "$(cat "$WORK/stdout")" stdout
    equal "to stderr" "$(cat "$WORK/stderr")" stderr
}
out_comes_back() { equal 'a plain file' "$(cat "$WORK/out/plain")" /out/plain; }
appended() { equal "$(seq 1000 | sed 's/^/line /' | sha256sum)" "$(sha256sum <"$WORK/out/lines")" "checksum of the lines"; }
drive_in() { equal 'written outside' "$(cat "$WORK/out/from-drive")" "start of the drive"; }
drive_out() { equal 'written inside' "$(dd if="$WORK/drive.img" bs=1 skip=4096 count=14 status=none)" "the image"; }
added_program() { contains 'GNU coreutils' "$WORK/out/version"; }
sized() {
    equal 1 "$(cat "$WORK/out/processors")" processors
    # The kernel reserves some of it.
    awk '$2 < 1.8e6 || $2 > 2.1e6 { exit 1 }' "$WORK/out/memory"
}

claim "a command's exit status is returned" status_passes
claim "stdout, stderr and the console are separate, and arguments are preserved" output_apart
claim "what a command leaves in /out is copied to --out" out_comes_back
claim "nothing is lost of a file in /out that one process appends to while others read it" appended
claim "the host reads what the drive image holds" drive_in
claim "what the host writes is in the drive image" drive_out
claim "a program is added with its libraries" added_program
claim "the host has the requested memory and processors" sized

bound_function() {
    scripts/testbed run --timeout 60 -- sh -c \
        'basename "$(readlink /sys/bus/pci/devices/0000:00:04.0/driver)"; ls /dev/vfio/devices' >"$WORK/stdout"
    equal 'vfio-pci vfio0' "$(paste -sd ' ' "$WORK/stdout")" "driver and device"
}
not_bound() {
    local status=0
    scripts/testbed run --kernel initcall_blacklist=vfio_pci_init -- true 2>"$WORK/stderr" || status=$?
    equal 125 "$status" "exit status"
    contains '0000:00:04.0 is not bound to vfio-pci; from the kernel log' "$WORK/stderr"
    lacks 'restarting' "$WORK/stderr"
}
panicked() {
    local status=0
    scripts/testbed run --timeout 60 -- sh -c 'echo c >/proc/sysrq-trigger' 2>"$WORK/stderr" || status=$?
    equal 125 "$status" "exit status"
    contains 'Kernel panic - not syncing: sysrq triggered crash' "$WORK/stderr"
}
refused() {
    local status=0
    scripts/testbed run --profile nonesuch -- true 2>"$WORK/stderr" || status=$?
    equal 125 "$status" "exit status"
    contains 'no profile named nonesuch; known profiles: amd-iommu' "$WORK/stderr"
}
# A cache that contains only fio, so that fio is not built again.
own_kernel() {
    mkdir "$WORK/cache"
    ln -s "$TESTBED_CACHE/fio" "$WORK/cache/fio"
    cp "$(kernel_image)" "$WORK/bzImage"
    TESTBED_CACHE=$WORK/cache TESTBED_KERNEL=$WORK/bzImage scripts/testbed run --timeout 60 -- uname -s >"$WORK/stdout"
    equal Linux "$(cat "$WORK/stdout")" "system"
    cmp "$WORK/bzImage" "$WORK"/cache/kernel-*/bzImage
    [[ ! -e $WORK/cache/linux-source ]]
}
no_own_kernel() {
    local status=0
    TESTBED_CACHE=$WORK/none TESTBED_KERNEL=$WORK/none scripts/testbed run -- true 2>"$WORK/stderr" || status=$?
    equal 125 "$status" "exit status"
    equal "testbed: TESTBED_KERNEL=$WORK/none: no such file (wanted: a bzImage)" "$(cat "$WORK/stderr")" "message"
    [[ ! -e $WORK/none ]]
}
# Types only after the prompt has appeared: a starting shell discards earlier input.
prompt() {
    # shellcheck disable=SC2094 # the output is read while it is written
    {
        within 100 grep -F '~ #' "$WORK/stdout" || exit
        while echo 'echo "six times seven is $((6 * 7))"; poweroff -f' 2>/dev/null; do sleep 5; done
    } | timeout 120 scripts/testbed shell >"$WORK/stdout" 2>"$WORK/stderr"
    contains 'six times seven is 42' "$WORK/stdout"
}
# Through standard input, because an unprivileged user may not be able to read this checkout.
packages_missing() {
    local status=0 plain=()
    ((EUID != 0)) || plain=(setpriv --reuid=65534 --regid=65534 --clear-groups)
    { cat "$TESTBED_DIR/lib.sh" && echo 'need bash=bash no-such-program=its-package /no/such/file=another'; } |
        "${plain[@]}" bash 2>"$WORK/stderr" || status=$?
    equal 125 "$status" "exit status"
    contains 'missing Debian packages: its-package another; install them with: sudo apt-get install -y its-package another' \
        "$WORK/stderr"
}
no_qemu_there() {
    local status=0
    TESTBED_QEMU=$WORK scripts/testbed run -- true 2>"$WORK/stderr" || status=$?
    equal 125 "$status" "exit status"
    contains "TESTBED_QEMU=$WORK: contains no QEMU" "$WORK/stderr"
}

claim "the NVMe function is bound to vfio-pci" bound_function
claim "a function that cannot be bound ends with status 125 and the kernel's reason, once" not_bound
claim "a command that hangs ends with status 124 and the console" outcome hang
claim "a host that hangs at boot is restarted, and the command runs once" outcome still_once
claim "a host that hangs at each boot fails after three attempts, with status 125" outcome still_always
claim "a host that hangs while the command runs is an error, with status 125" outcome still_later
claim "a kernel panic ends with status 125 and the console" panicked
claim "an unknown profile is refused with the list of profiles" refused
claim "TESTBED_KERNEL is used, and no kernel is built" own_kernel
claim "a missing TESTBED_KERNEL is a one-line error, and nothing is created" no_own_kernel
claim "an unprivileged user gets the one command that installs what is missing" packages_missing
claim "the shell has a prompt" prompt
claim "a TESTBED_QEMU without a QEMU is refused" no_qemu_there
finished
