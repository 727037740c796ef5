# shellcheck shell=bash
# The tests on arm64. None needs an arm64 machine.
#
# | what | shows | processor time, s |
# |---|---|---|
# | clippy for aarch64-unknown-linux-gnu | everything compiles, without a warning | 45 |
# | to compile the tests and the programs | | 70 |
# | unit and property tests under qemu-aarch64 | the arm64 code computes the same; not its memory ordering | 100 |
# | the emulated drive under qemu-aarch64, the oracle's front-end too | a disk is served | 10 |
# | the compiled barriers | they are those for a device | 1 |
# | the emulated host, tests/arm64/smmuv3.sh, with pages of 4 and of 16 KiB | VFIO type1 behind an SMMUv3, a guest | 60 each |
# | a kernel with iommufd and pages of 64 KiB | | once per cache: 811 files |
# | the emulated host, tests/arm64/iommufd.sh | iommufd behind an SMMUv3 | 40 |
# | the emulated host, tests/arm64/virtio_iommu.sh | the same behind the paravirtual IOMMU | 30 |
#
# "scripts/test" without a name includes the first two and the unit tests of what differs on arm64: about four minutes of a
# processor from nothing, and 150 MB to fetch, once per cache. The others need 250 MB more. Needs
# lib.sh, debian_kernel.sh, kernel.sh, and step and judge of scripts/test.

# Property tests repeat what the native ones have done with other inputs; a few cases run every line.
readonly ARM64_CASES=8
# Tests that take minutes under emulation: kills at each store, every order, long properties.
readonly ARM64_SKIPPED=(kill schedules rate_limited of_which_every_other_page thousand driver::nvme::tests::io fast_path oracle
    emulated::tests::any engine::tests::packed no_stale_byte hostile transfers_of_every_shape every_kind_of_ring
    bounced_requests_wait)

# arm64_packages: installs what Debian has as packages, before anything runs in parallel: apt allows one process at a time.
arm64_packages() {
    # In a subshell, so that what cannot be had fails this step and not the whole run.
    step "arm64: a linker and a user emulation" eval '(need_arm64_packages)'
}

# arm64_cargo_tests: what "scripts/test" without a name includes: the unit tests of what differs on arm64.
readonly ARM64_DIFFERS=(sys:: memory:: iommu:: driver::nvme::rings cache_maintenance)
arm64_cargo_tests() {
    arm64_compiles || return 0
    step "arm64: unit tests of memory, caches and the kernel's interfaces, emulated" arm64_units "${ARM64_DIFFERS[@]}"
    step "arm64: cache lines and their granule on a processor with lines of 256 bytes" arm64_long_lines
}

# arm64_compiles: fails without the toolchain; one step has failed then.
arm64_compiles() {
    step "arm64: rustc and clippy of Debian, with the arm64 library" eval '(need_arm64_rust)'
    [[ -e $(arm64_rust)/made-of ]] || return 1
    step "arm64: compiles, and clippy: no warning" arm64_clippy
}

# arm64_cargo [VARIABLE=VALUE]… ARGUMENT…: Cargo compiles for arm64, and runs tests under user emulation. It has a target
# directory of its own, so another Cargo at work does not hold it up.
arm64_cargo() {
    local variables=() dir
    dir=$(arm64_rust)
    while [[ ${1:-} == *=* ]]; do variables+=("$1") && shift; done
    # shellcheck disable=SC2153 # scripts/test sets TARGET
    env RUSTC="$dir/bin/rustc" CARGO_BUILD_TARGET="$ARM64_TARGET" CARGO_TARGET_DIR="$TARGET/arm64" \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L $ARM64_LIBC" "${variables[@]}" cargo "$@"
}

arm64() {
    # shellcheck disable=SC2153 # scripts/test sets it
    local target=$TARGET/arm64/$ARM64_TARGET/debug
    arm64_packages
    arm64_compiles || return 0
    step "arm64: unit and property tests, emulated" arm64_units
    step "arm64: cache lines and their granule on a processor with lines of 256 bytes" arm64_long_lines
    step "arm64: the emulated drive serves the oracle's front-end" arm64_drive "$target"
    step "arm64: the programs for the emulated host" arm64_programs "$target"
    step "arm64: the barriers are those that a device needs" arm64_barriers "$target"
    arm64_in_host smmuv3 linux-image-arm64
    arm64_in_host smmuv3 linux-image-arm64-16k
    step "arm64: a kernel with iommufd and pages of 64 KiB" arm64_kernel
    arm64_in_host iommufd iommufd
    arm64_in_host virtio_iommu iommufd
}

# By the fetched clippy, which reads the fetched library. Cargo's own subcommand would start this machine's.
arm64_clippy() {
    arm64_cargo RUSTC_WORKSPACE_WRAPPER="$(arm64_rust)/bin/clippy-driver" CLIPPY_ARGS=-Dwarnings \
        check --workspace --all-targets --locked
}

# Where the emulator is not the kernel: it makes /proc/self/maps a memfd, and "/" the directory of the libraries, and it has no
# set_mempolicy. The last two allow a peer and a controller some seconds, which are few under emulation. It has neither seccomp nor
# landlock: the tests of the sandbox run in the emulated host with Debian's kernel.
readonly ARM64_EMULATOR=(sandbox::tests each_kind_is_recognized that_is_not_a_file_is_refused whose_file_system_need_not_answer
    a_node_is_preferred_until_the_guard_is_dropped a_monitor_that_floods a_controller_that_is_silent_after_it_is_enabled)

# arm64_units [FILTER…]: the backend's, or those whose names contain a filter, and the shim's.
arm64_units() {
    local name skipped=()
    for name in "${ARM64_SKIPPED[@]}" "${ARM64_EMULATOR[@]}"; do skipped+=(--skip "$name"); done
    arm64_cargo "PROPTEST_CASES=$ARM64_CASES" test --locked --lib -p vhost-device-vfio -- "$@" "${skipped[@]}" &&
        arm64_cargo test --locked --lib -p kvm-vfio-shim
}
arm64_long_lines() {
    # shellcheck disable=SC2153 # scripts/test sets WORK
    arm64_cargo CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu a64fx -L $ARM64_LIBC" \
        test --locked --lib -p vhost-device-vfio -- --nocapture sys::cache cache_maintenance >"$WORK/arm64-lines" 2>&1 || {
        cat "$WORK/arm64-lines"
        return 1
    }
    grep 'CacheLines { instruction: DcCivac, line: 256, granule: 256 }' "$WORK/arm64-lines"
}

# arm64_drive TARGET: both processes are emulated.
arm64_drive() {
    local target=$1 work server status=0
    arm64_cargo build --locked -p vhost-device-vfio && arm64_cargo build --locked -p testbed --bin front-end || return
    work=$(mktemp -d)
    # The emulator has threads of its own, with which the program would not fork its helper.
    qemu-aarch64 -L "$ARM64_LIBC" "$target/vhost-device-vfio" --sandbox off --socket-path "$work/s" --queues 2 \
        --device emulated:size=64M,queues=2,order=random,latency=300us &
    server=$!
    until [[ -S $work/s ]]; do kill -0 "$server" && sleep 0.2 || return 1; done
    { echo 3000 && sleep 1 && echo end; } | qemu-aarch64 -L "$ARM64_LIBC" "$target/front-end" "$work/s" |
        tee "$work/said" || status=$?
    kill "$server" && wait "$server" || status=$?
    grep -q 'nothing lost, doubled or reordered' "$work/said" || status=1
    rm -rf "$work"
    return "$status"
}

# arm64_executables OPTION…: builds the test programs and prints their paths.
arm64_executables() {
    arm64_cargo test --locked --no-run --message-format=json "$@" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

# arm64_programs TARGET: builds them, and places them in WORK/arm64 as the host has them. The shim's tests find each other in
# Cargo's layout.
arm64_programs() {
    # shellcheck disable=SC2153 # scripts/test sets WORK
    local target=$1 tree=$WORK/arm64/usr/local program name
    mkdir -p "$tree"/{bin,shim/deps,shim/examples}
    # The preloaded library has the name of the shim's, so one call for each.
    arm64_cargo build --locked -p vhost-device-vfio -p testbed -p kvm-vfio-shim-preload --lib --bins --examples &&
        {
            arm64_executables -p vhost-device-vfio --lib --test live && arm64_executables -p kvm-vfio-shim --lib &&
                arm64_executables -p kvm-vfio-shim-preload --test hooks
        } >"$WORK/arm64-programs" || return
    while read -r program; do
        name=${program##*/} name=${name%-*}
        case $name in
        live) cp "$program" "$tree/bin/live" ;;
        vhost_device_vfio) cp "$program" "$tree/bin/unit-tests" ;;
        hooks | kvm_vfio_shim) cp "$program" "$tree/shim/deps/$name" ;;
        esac
    done <"$WORK/arm64-programs"
    cp "$target"/{vhost-device-vfio,iommu-probe,front-end} "$tree/bin/" &&
        cp "$target/libkvm_vfio_shim.so" "$tree/shim/" && cp "$target/examples/toy_vmm" "$tree/shim/examples/" &&
        aarch64-linux-gnu-strip "$tree"/bin/* "$tree"/shim/*.so "$tree"/shim/*/*
}

# arm64_barriers TARGET: no emulation notices a barrier that is missing or too weak. So the compiled functions are looked at.
arm64_barriers() {
    local function instruction symbol
    aarch64-linux-gnu-nm "$1/vhost-device-vfio" >"$WORK/arm64-symbols"
    while read -r function instruction; do
        symbol=$(sed -n "s/^[0-9a-f]* . \(_R.*$function.*\)/\1/p" "$WORK/arm64-symbols" | head -n 1)
        [[ -n $symbol ]] || { echo "no function $function" && return 1; }
        aarch64-linux-gnu-objdump --disassemble="$symbol" --no-show-raw-insn "$1/vhost-device-vfio" | tr '\t' ' ' |
            grep -E ": +$instruction" || { echo "no $instruction in $function" && return 1; }
    done <<'FUNCTIONS'
3sys7barrier21before_register_store dmb +osh$
3sys7barrier17after_device_load dmb +oshld$
3sys4mmio.*Registers7write32 bl .*before_register_store
3sys4mmio.*Registers7write64 bl .*before_register_store
3sys4mmio.*Registers6read32 bl .*after_device_load
3sys4mmio.*Registers6read64 bl .*after_device_load
11SharedArray.*12read_acquire bl .*after_device_load
3sys5cache10flush_line dc +civac
3sys5cache7barrier dsb +sy
FUNCTIONS
}

# arm64_in_host TEST KERNEL
arm64_in_host() {
    local test=$1 kernel=$2 status=0 began=$SECONDS log=$LOGS/arm64-$1-$2.log
    arm64_host "$test" "$kernel" "$WORK/arm64" >"$log" 2>&1 || status=$?
    judge "$test, $kernel" "$log" "$status"
    part $((SECONDS - began)) "arm64: $test, $kernel"
}
