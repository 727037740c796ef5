# shellcheck shell=bash
# The guest of the emulated host, run by `guest` directly on this machine under TCG, without root or KVM. Its files are in WORK. Needs
# kernel.sh and image.sh, and a testbed that is built.

export GUEST_PARTS=$WORK/parts GUEST_RUN=$WORK GUEST_ACCEL='-accel tcg,thread=multi -cpu max'

prepare_guest() {
    local applet
    mkdir -p "$GUEST_PARTS" "$WORK/bin"
    cpio --extract --quiet --to-stdout testbed/guest.cpio <"$(host_image)" >"$GUEST_PARTS/guest.cpio"
    ln -s "$(kernel_image)" "$GUEST_PARTS/bzImage"
    ln -s "$TESTBED_DIR/guest/init" "$GUEST_PARTS/guest-init"
    ln -s "$TESTBED_DIR/host/bin"/{guest,waits} "$WORK/bin"
    for applet in usleep awk; do ln -s "$(command -v busybox)" "$WORK/bin/$applet"; done
    # Not earlier: the images are built with this machine's QEMU.
    PATH=$WORK/bin:${TESTBED_QEMU:+$TESTBED_QEMU/bin:}$PATH
}
