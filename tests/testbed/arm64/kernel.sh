# shellcheck shell=bash
# The kernels of the arm64 host with iommufd: the source of the testbed's x86 kernel with kernel-arm64.config, cross-built once
# for each page size and cached. Debian's own arm64 kernels have no CONFIG_IOMMUFD. Needs lib.sh and ../kernel.sh.

readonly ARM64_MAKE=(ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-)

# arm64_kernel_image PAGES: the path of the image with pages of 4K, 16K or 64K. It may not exist.
arm64_kernel_image() {
    local key
    key=$(hash_of "$(cat "$TESTBED_CACHE/linux-source/version" "$TESTBED_DIR/kernel-arm64.config"
        aarch64-linux-gnu-gcc --version | head -n 1)")
    echo "$TESTBED_CACHE/arm64/kernel-$1-$key/Image"
}

# arm64_kernels PAGES…: builds what is not in the cache.
arm64_kernels() {
    local build=$TESTBED_CACHE/arm64/kernel.build pages image
    take_lock
    fetch_kernel_source
    for pages; do
        image=$(arm64_kernel_image "$pages")
        [[ -e $image ]] || build_arm64_kernel "$pages" "$image" "$build"
    done
    rm -rf "$build"
    drop_lock
}

# build_arm64_kernel PAGES IMAGE BUILD
build_arm64_kernel() {
    local pages=$1 image=$2 build=$3
    need flex=flex bison=bison bc=bc perl=perl make=make gcc=gcc xz=xz-utils
    unpack_kernel_source "$build"
    KERNEL_OBJECTS=$build/objects-$pages
    mkdir -p "$KERNEL_OBJECTS"
    { cat "$TESTBED_DIR/kernel-arm64.config" && echo "CONFIG_ARM64_${pages}_PAGES=y"; } >"$build/config-$pages"
    watched "configuring Linux for arm64 with pages of $pages" "$build/configure.log" arm64_kernel_progress \
        configure_kernel "$build/source" "$KERNEL_OBJECTS" "$build/config-$pages" "${ARM64_MAKE[@]}"
    watched "building it (once)" "$build/build.log" arm64_kernel_progress \
        make -C "$build/source" O="$KERNEL_OBJECTS" "${ARM64_MAKE[@]}" -j"$(nproc)" Image
    mkdir -p "${image%/Image}"
    cp "$KERNEL_OBJECTS/.config" "${image%/Image}/config"
    mv "$KERNEL_OBJECTS/arch/arm64/boot/Image" "$image"
    rm -rf "$KERNEL_OBJECTS"
}
arm64_kernel_progress() { echo "$(find "$KERNEL_OBJECTS" -name '*.o' | wc -l) files compiled"; }
