# shellcheck shell=bash
# The kernel of the arm64 host with iommufd: the source of the testbed's x86 kernel with kernel-arm64.config, cross-built once and
# cached. Debian's own arm64 kernels have no CONFIG_IOMMUFD. Needs lib.sh and ../kernel.sh.

readonly ARM64_MAKE=(ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-)

# arm64_kernel_image: its path. It may not exist.
arm64_kernel_image() {
    local key
    key=$(hash_of "$(cat "$TESTBED_CACHE/linux-source/version" "$TESTBED_DIR/kernel-arm64.config"
        aarch64-linux-gnu-gcc --version | head -n 1)")
    echo "$TESTBED_CACHE/arm64/kernel-$key/Image"
}

# arm64_kernel: builds it if it is not in the cache.
arm64_kernel() {
    local build=$TESTBED_CACHE/arm64/kernel.build image
    need flex=flex bison=bison bc=bc perl=perl make=make gcc=gcc xz=xz-utils
    take_lock
    fetch_kernel_source
    image=$(arm64_kernel_image)
    [[ -e $image ]] || build_arm64_kernel "$build" "$image"
    drop_lock
}

# build_arm64_kernel BUILD IMAGE
build_arm64_kernel() {
    local build=$1 image=$2
    unpack_kernel_source "$build"
    KERNEL_OBJECTS=$build/objects
    watched "configuring Linux for arm64" "$build/configure.log" arm64_kernel_progress \
        configure_kernel "$build/source" "$KERNEL_OBJECTS" "$TESTBED_DIR/kernel-arm64.config" "${ARM64_MAKE[@]}"
    watched "building it (once)" "$build/build.log" arm64_kernel_progress \
        make -C "$build/source" O="$KERNEL_OBJECTS" "${ARM64_MAKE[@]}" -j"$(nproc)" Image
    mkdir -p "${image%/Image}"
    cp "$KERNEL_OBJECTS/.config" "${image%/Image}/config"
    mv "$KERNEL_OBJECTS/arch/arm64/boot/Image" "$image"
    rm -rf "$build"
}
arm64_kernel_progress() { echo "$(find "$KERNEL_OBJECTS" -name '*.o' | wc -l) files compiled"; }
