# shellcheck shell=bash
# The emulated host: builds a QEMU command line from a profile and the options.

# read_profile NAME: sets PROFILE_MACHINE, PROFILE_KERNEL, PROFILE_DEBIAN, PROFILE_DEVICES and PROFILE_ANSWERS from "key = value"
# lines; "device" and "answer" may occur more than once. "debian" names the suite whose own kernel the host runs. Tests in the
# emulated host read "kvm": how often non-coherent DMA is registered with KVM there, by the backend under each policy and by QEMU
# for a device that it owns.
read_profile() {
    local file=$TESTBED_DIR/profiles/$1.profile line key value
    [[ -r $file ]] || die "no profile named $1; known profiles: $(profile_names)"
    PROFILE_MACHINE='' PROFILE_KERNEL='' PROFILE_DEBIAN='' PROFILE_DEVICES=() PROFILE_ANSWERS=()
    while read -r line; do
        [[ $line != '' && $line != \#* ]] || continue
        key=${line%% *} value=${line#* = }
        # shellcheck disable=SC2034 # scripts/testbed reads PROFILE_DEBIAN
        case $key in
        machine) PROFILE_MACHINE=$value ;;
        kernel) PROFILE_KERNEL=$value ;;
        debian) PROFILE_DEBIAN=$value ;;
        device) PROFILE_DEVICES+=(-device "$value") ;;
        answer) PROFILE_ANSWERS+=("$value") ;;
        verdict | kvm) ;; # for tests/host/coherency.sh and shim.sh
        *) die "$file: unknown key '$key' (known: machine, kernel, debian, device, answer, verdict, kvm)" ;;
        esac
    done <"$file"
    if [[ $* == *scalable* ]] && ! qemu-system-x86_64 -device intel-iommu,help | grep -q x-scalable-mode; then
        PROFILE_DEVICES=("${PROFILE_DEVICES[@]//x-scalable-mode/scalable-mode}")
        PROFILE_DEVICES=("${PROFILE_DEVICES[@]//x-flts/fsts}")
    fi
}
profile_names() { (cd "$TESTBED_DIR/profiles" && ls -- *.profile) | sed 's/\.profile$//' | paste -sd ' '; }

# one_processor: the processor on which QEMU runs. If TCG runs two emulated processors in parallel, nested virtualization
# sometimes takes an interrupt before the host's GS base is restored, and the host's kernel panics (QEMU 10.0).
one_processor() { processors | head -n 1; }

# quoted ARGUMENT…: one line that a POSIX shell reads back as the same arguments.
quoted() {
    local argument line=''
    for argument; do line+="'${argument//\'/\'\\\'\'}' "; done
    echo "$line"
}

# stage_checkout ROOT: copies what may differ at each start: this checkout's programs and scripts, and the files of --add.
stage_checkout() {
    local root=$1 target=${CARGO_TARGET_DIR:-$TESTBED_ROOT/target}/release file dest
    mkdir -p "$root"/{testbed,usr/local/bin,usr/local/lib}
    place "$root" /init "$TESTBED_DIR/host/init"
    place "$root" /testbed/guest-init "$TESTBED_DIR/guest/init"
    place "$root" /testbed/claims.sh "$TESTBED_DIR/claims.sh"
    place "$root" /testbed/profile "$TESTBED_DIR/profiles/$OPT_PROFILE.profile"
    for file in "$TESTBED_DIR"/host/bin/*; do place "$root" "/usr/local/bin/${file##*/}" "$file"; done
    [[ -z $HOST_KERNEL ]] || cp -r "$HOST_KERNEL/modules" "$root/testbed/modules"
    [[ -z $GUEST_KERNEL ]] || cp -r "$GUEST_KERNEL" "$root/testbed/debian-kernel"
    [[ -z ${TESTBED_QEMU:-} ]] || { mkdir -p "$root/opt" && cp -rL "$TESTBED_QEMU" "$root/opt/qemu"; }
    for file in "$TESTBED_ROOT"/tests/host/*; do place "$root" "/testbed/tests/${file##*/}" "$file"; done
    if [[ -d $target ]]; then
        while read -r file; do
            case $file in
            *.so) stage_program "$root" "$file" "/usr/local/lib/${file##*/}" ;;
            *) stage_program "$root" "$file" "/usr/local/bin/${file##*/}" ;;
            esac
        done < <(find "$target" -maxdepth 1 -type f -perm -u+x)
    fi
    for file in "${OPT_ADD[@]}"; do
        dest=''
        [[ $file != *:* ]] || { dest=${file##*:} && file=${file%:*}; }
        [[ -e $file ]] || die "--add $file: no such file"
        if [[ -d $file ]]; then
            mkdir -p "$root${dest:-/${file##*/}}" && cp -rL "$file/." "$root${dest:-/${file##*/}}"
        elif [[ -x $file ]]; then
            stage_program "$root" "$(realpath "$file")" "${dest:-/usr/local/bin/${file##*/}}"
        else
            place "$root" "${dest:-/${file##*/}}" "$file"
        fi
    done
}

# stage_program ROOT FILE DEST: copies FILE and those of its libraries that are not in the host's image.
stage_program() {
    local library
    place "$1" "$3" "$2"
    closure "$2" | while read -r library; do
        grep -qxF "$library" "$HOST_IMAGE.files" || place "$1" "$library" "$library"
    done
}

# erms, fsrm: with them Linux copies and clears memory by byte-wise string instructions, which the emulation executes slowly.
# la57: one more level of page tables, twice with nested virtualization.
# no_timer_check: the kernel's test of the timer at boot panics if the emulation gets too little processor time.
#
# machine_arguments WORK: sets QEMU_ARGUMENTS. The IOMMU must come before the functions that it translates. Virtio devices are at
# address 10 and above, so the addresses below are free for the functions under test.
machine_arguments() {
    local work=$1 kernel
    kernel=$(kernel_image)
    [[ -z $HOST_KERNEL ]] || kernel=$HOST_KERNEL/vmlinuz
    QEMU_ARGUMENTS=(
        -name testbed -machine "$PROFILE_MACHINE" -accel tcg,thread=multi -cpu max,erms=off,fsrm=off,la57=off
        -smp "$OPT_SMP" -m "$OPT_MEM" -nodefaults -no-user-config -display none -no-reboot
        -kernel "$kernel" -initrd "$work/initrd"
        -append "console=ttyS0 panic=-1 oops=panic no_timer_check random.trust_cpu=on $PROFILE_KERNEL $OPT_KERNEL"
        -serial "file:$work/console.log"
        "${PROFILE_DEVICES[@]}"
        -drive "if=none,id=drive,format=raw,cache=unsafe,discard=unmap,file=$OPT_DRIVE${OPT_IOPS:+,throttling.iops-total=$OPT_IOPS}"
        -device "nvme,drive=drive,serial=testbed,addr=4${OPT_NVME:+,$OPT_NVME}"
        -device virtio-serial-pci,id=ports,addr=10
        -chardev "file,id=status,path=$work/status"
        -device virtserialport,bus=ports.0,chardev=status,name=status
        -chardev "file,id=alive,path=$work/alive"
        -device virtserialport,bus=ports.0,chardev=alive,name=alive
    )
    if [[ -n $OPT_OUT ]]; then
        QEMU_ARGUMENTS+=(-fsdev "local,id=out,path=$OPT_OUT,security_model=none"
            -device virtio-9p-pci,fsdev=out,mount_tag=out,addr=11)
    fi
    QEMU_ARGUMENTS+=("${OPT_QEMU[@]}")
}

# serve_function WORK: serves the function of --function for as long as the host runs, and adds it to QEMU_ARGUMENTS. The bit is
# left to the host: --no-snoop allow. QEMU lets a function behind VT-d be mapped by its own listener in caching mode only.
serve_function() {
    local socket=$1/function.sock program=${CARGO_TARGET_DIR:-$TESTBED_ROOT/target}/release/vhost-device-vfio
    [[ -x $program ]] || die "--function: $program is not there; cargo build --release makes it"
    # shellcheck disable=SC2034 # start_host in scripts/testbed starts it
    HOST_QEMU=$(cached_qemu "$SERVED_QEMU")/bin/qemu-system-x86_64
    "$program" --vfio-user --socket-path "$socket" --device "emulated:no-snoop=controllable,$OPT_FUNCTION" --no-snoop allow \
        </dev/null >"$1/function.log" 2>&1 &
    SERVER_PID=$!
    until listens "$socket"; do
        kill -0 "$SERVER_PID" 2>/dev/null || die "--function $OPT_FUNCTION: $(tail -n 1 "$1/function.log")"
        sleep 0.1
    done
    QEMU_ARGUMENTS=("${QEMU_ARGUMENTS[@]/#intel-iommu,/intel-iommu,caching-mode=on,}")
    QEMU_ARGUMENTS+=(-object "memory-backend-memfd,id=ram,size=$OPT_MEM,share=on" -machine memory-backend=ram
        -device "{\"driver\":\"vfio-user-pci\",\"addr\":\"8\",\"socket\":{\"type\":\"unix\",\"path\":\"$socket\"}}")
}
