# shellcheck shell=bash
# Shared by all parts of the testbed: messages, the cache and its lock, Debian packages.

TESTBED_CACHE=${TESTBED_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vhost-device-vfio}
# mkfs.ext4 and debugfs are in sbin, which is not in an unprivileged user's PATH.
PATH=$PATH:/usr/sbin:/sbin

# Exit status of the testbed's own failures, as opposed to those of the command.
# shellcheck disable=SC2034 # used by the scripts that source this
readonly EXIT_TIMEOUT=124 EXIT_TESTBED=125

say() { printf 'testbed: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit "$EXIT_TESTBED"
}

# processors: the processors that this process may use, one per line.
processors() {
    local first last
    sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status | tr , '\n' |
        while IFS=- read -r first last; do seq "$first" "${last:-$first}"; done
}

# listens SOCKET: as in claims.sh.
listens() { grep -q " 00010000 .* $1\$" /proc/net/unix; }

# hash_of TEXT: a short hash of TEXT.
hash_of() { printf '%s' "$1" | sha256sum | cut -c1-16; }

# take_lock [NAME]: serializes builds in one cache. The second build waits and then finds the results of the first.
take_lock() {
    mkdir -p "$TESTBED_CACHE"
    exec {TESTBED_LOCK}>"$TESTBED_CACHE/${1:-lock}"
    flock -n "$TESTBED_LOCK" && return
    say "another build is using $TESTBED_CACHE; waiting for it"
    flock "$TESTBED_LOCK"
}
drop_lock() { exec {TESTBED_LOCK}>&-; }

# watched TITLE LOG MEASURE COMMAND…: runs COMMAND with its output in LOG. Every ten seconds it runs MEASURE, which prints the
# progress.
watched() {
    local title=$1 log=$2 measure=$3 began=$SECONDS said=$SECONDS pid
    shift 3
    say "$title"
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.3
        ((SECONDS - said < 10)) && continue
        said=$SECONDS
        say "  $($measure) after $((SECONDS - began)) s"
    done
    if ! wait "$pid"; then
        tail -n 30 "$log" >&2
        die "failed: $title; the whole log is $log"
    fi
    say "  done in $((SECONDS - began)) s"
}

# fetched: the progress of a download by a private apt, for watched.
fetched() { du -sh "$TESTBED_CACHE/apt" | sed 's/\s.*/ fetched/'; }

# need NAME=PACKAGE…: installs the packages whose NAME is missing. NAME is a program in PATH, or a file if it starts with a
# slash.
need() {
    local pair name missing=()
    for pair; do
        name=${pair%%=*}
        if [[ $name == /* ]]; then
            [[ -e $name ]] || missing+=("${pair#*=}")
        else
            command -v "$name" >/dev/null || missing+=("${pair#*=}")
        fi
    done
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
}

# install_packages PACKAGE…: installs them from the suites that this machine already uses.
install_packages() {
    ((EUID == 0)) || die "missing Debian packages: $*; install them with: sudo apt-get install -y $*"
    mkdir -p "$TESTBED_CACHE"
    watched "installing Debian packages: $*" "$TESTBED_CACHE/apt-install.log" apt_progress \
        apt_install_system "$@"
}
apt_progress() { tail -n 1 "$TESTBED_CACHE/apt-install.log"; }
apt_install_system() {
    export DEBIAN_FRONTEND=noninteractive
    # A new container has no package lists, and an old list names versions that no longer exist.
    apt-get install -y --no-install-recommends "$@" && return
    apt-get update && apt-get install -y --no-install-recommends "$@"
}

# debian_mirror: the URL of Debian in this machine's own apt configuration.
debian_mirror() {
    local mirror
    # shellcheck disable=SC2016 # apt fills these in
    mirror=$(apt-get indextargets --no-release-info \
        --format '$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)' 2>/dev/null |
        awk '$1 == "Packages" && $4 == "main" && $3 !~ /-/ && $2 ~ /debian(\.list)?\/?$/ { print $2; exit }')
    [[ -n $mirror ]] || die "no Debian mirror in apt's configuration (wanted: a source ending in /debian," \
        "component main); name a kernel of your own with TESTBED_KERNEL=/path/to/bzImage"
    echo "$mirror"
}

debian_keyring() {
    local keyring
    for keyring in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
        [[ ! -e $keyring ]] || { echo "$keyring" && return; }
    done
    die "no Debian keyring in /usr/share/keyrings; install it with:" \
        "sudo apt-get install -y debian-archive-keyring"
}

# apt_private NAME TYPE SUITE…: sets APT_PRIVATE to the options of a private configuration. It has these suites, prefers the
# first, and keeps its lists in the cache. Nothing in /etc/apt changes.
apt_private() {
    local dir=$TESTBED_CACHE/apt/$1 type=$2 mirror keyring suite
    shift 2
    mirror=$(debian_mirror)
    keyring=$(debian_keyring)
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    for suite; do echo "$type [signed-by=$keyring] $mirror $suite main"; done >"$dir/sources.list"
    # shellcheck disable=SC2034 # read by the caller
    APT_PRIVATE=(-o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir/cache" -o APT::Sandbox::User=root
        -o "APT::Default-Release=$1")
}

debian_codename() {
    # shellcheck source=/dev/null
    (. /etc/os-release && echo "${VERSION_CODENAME:-sid}")
}

# need_qemu: installs QEMU 10 or newer, for x86-64 hosts.
need_qemu() {
    need_qemu_program qemu-system-x86_64 qemu-system-x86 qemu-utils
    need qemu-img=qemu-utils qemu-storage-daemon=qemu-system-common
}
# need_qemu_program PROGRAM PACKAGE…: installs the packages if PROGRAM is missing or older than QEMU 10. Debian 12 has it in its
# backports, which are used here without being added to this machine's sources.
need_qemu_program() {
    local program=$1 found codename dir=$TESTBED_CACHE/apt/qemu
    shift
    found=$("$program" --version 2>/dev/null | sed -n '1s/.* version \([0-9]*\).*/\1/p' || true)
    ((${found:-0} < 10)) || return 0
    codename=$(debian_codename)
    if [[ $codename != bookworm ]]; then
        install_packages "$@"
        return
    fi
    ((EUID == 0)) || die "$program of QEMU 10 or newer is needed, found ${found:-none}; install it as root" \
        "from bookworm-backports: apt-get install -t bookworm-backports $*"
    mkdir -p "$dir/lists/partial"
    { cat /etc/apt/sources.list 2>/dev/null || true; } >"$dir/sources.list"
    echo "deb [signed-by=$(debian_keyring)] $(debian_mirror) bookworm-backports main" >>"$dir/sources.list"
    watched "installing $* from bookworm-backports" "$TESTBED_CACHE/apt-install.log" apt_progress \
        apt_install_qemu "$dir" "$@"
}
apt_install_qemu() {
    local own=(-o "Dir::Etc::sourcelist=$1/sources.list" -o "Dir::State::Lists=$1/lists" -o APT::Sandbox::User=root)
    shift
    export DEBIAN_FRONTEND=noninteractive
    # The update may fail because of another source of this machine. Only the install must succeed.
    apt-get "${own[@]}" update || true
    apt-get "${own[@]}" install -y --no-install-recommends -t bookworm-backports "$@"
}
