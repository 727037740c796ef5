# shellcheck shell=sh
# Claims and assertions in POSIX shell, for tests inside and outside the emulated host.
#
# A test file sources this, makes claims, and ends with `finished`. Each claim prints one line, "ok - …" or "not ok - …". The
# output of its command follows a claim that failed.

CLAIMS=0
BROKEN=0

# claim NAME COMMAND…: passes if no step of COMMAND, usually a function of the test, fails. It runs in a subshell, so it can pass
# data to later claims only in files.
claim() {
    name=$1
    shift
    CLAIMS=$((CLAIMS + 1))
    said=$(mktemp)
    (
        set -e
        "$@"
    ) >"$said" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        echo "ok - $name"
    else
        BROKEN=$((BROKEN + 1))
        echo "not ok - $name"
        echo "#   status $status"
        sed 's/^/#   /' "$said"
    fi
    rm -f "$said"
}

# finished: prints the plan at the end. A file without a plan has died. A file without a claim has failed.
finished() {
    cat "${REMARKS:-/dev/null}" 2>/dev/null
    echo "1..$CLAIMS"
    [ "$CLAIMS" -gt 0 ] && [ "$BROKEN" -eq 0 ]
    exit
}

# equal WANTED FOUND [WHAT]
equal() {
    [ "$1" = "$2" ] || {
        echo "${3:-value}: wanted '$1', found '$2'"
        return 1
    }
}

# contains TEXT FILE
contains() {
    grep -qF -e "$1" "$2" || {
        echo "wanted in $2: '$1'; found:"
        tail -n 20 "$2"
        return 1
    }
}

# lacks TEXT FILE
lacks() {
    ! grep -F -e "$1" "$2" || {
        echo "not wanted in $2: '$1'"
        return 1
    }
}

# listens SOCKET: somebody accepts connections there. Its file can exist before that, and afterwards. 00010000 is __SO_ACCEPTCON.
listens() { grep -q " 00010000 .* $1\$" /proc/net/unix; }

# within SECONDS COMMAND…: repeats COMMAND until it succeeds.
within() {
    limit=$1
    shift
    began=$(cut -d . -f 1 /proc/uptime)
    until "$@" >/dev/null 2>&1; do
        [ $(($(cut -d . -f 1 /proc/uptime) - began)) -lt "$limit" ] || {
            echo "not within $limit s: $*"
            return 1
        }
        sleep 0.1
    done
}
