# shellcheck shell=bash
# Schedules the tests for scripts/test: which of them share a boot of the emulated host, and on which processor a host runs.
#
# A job is one boot with its test files, "BOOT@PROFILE", or one test on this machine, "outside/NAME". The head of a test file
# has these lines:
#   # profiles: P…   the profiles on which it runs (tests/host only)
#   # minutes: N     roughly how long it takes, alone on a processor of 2.5 GHz; may be a fraction
#   # boot: NAME     the boot that it shares with all files of that name on the same profile (default: one of its own)
#   # options: …     further options of scripts/testbed run; those of the files that share a boot are joined

declare -A JOB_FILES=() JOB_OPTIONS=() JOB_MINUTES=()
JOBS=() ONLY_PROFILE=''
# Seconds for each test file. The time-out of a boot is the sum for its files.
readonly FILE_TIMEOUT=600
# Memory that an emulated host needs, kB.
readonly HOST_MEMORY=6000000

header() { sed -n "s/^# $1: //p" "$2"; }
host_file() { echo "$TESTBED_ROOT/tests/host/$1.sh"; }
host_log() { echo "$LOGS/host-$1-$2.log"; }

plan_host_tests() {
    local name file boot profiles profile job options minutes
    for name; do
        file=$(host_file "$name")
        [[ -e $file ]] || { failed "$name: there is no tests/host/$name.sh" && continue; }
        boot=$(header boot "$file")
        profiles=${ONLY_PROFILE:-$(header profiles "$file")}
        options=$(header options "$file")
        minutes=$(header minutes "$file")
        [[ -n $profiles ]] || failed "$name: no line '# profiles: …' in tests/host/$name.sh"
        for profile in $profiles; do
            job=${boot:-$name}@$profile
            JOB_FILES[$job]+=" $name"
            JOB_MINUTES[$job]=$(awk "BEGIN { print ${JOB_MINUTES[$job]:-0} + ${minutes:-1} }")
            # Files with the same options share the devices.
            [[ -z $options || " ${JOB_OPTIONS[$job]:-} " == *" $options "* ]] || JOB_OPTIONS[$job]+=" $options"
        done
    done
    sort_jobs
}
plan_outside_tests() {
    local name
    for name; do
        JOB_FILES[outside/$name]=$name
        JOB_MINUTES[outside/$name]=$(header minutes "$TESTBED_ROOT/tests/outside/$name.sh")
    done
    sort_jobs
}
# The longest job first, so that it does not run alone at the end.
sort_jobs() {
    local job
    readarray -t JOBS < <(for job in "${!JOB_FILES[@]}"; do echo "${JOB_MINUTES[$job]:-1} $job"; done |
        sort -k 1,1nr -k 2 | cut -d ' ' -f 2)
    for job in "${JOBS[@]}"; do check_options "$job"; done
}
# check_options JOB: fails if files that share a boot give one option two values.
check_options() {
    local job=$1 words values=' '
    read -r -a words <<<"${JOB_OPTIONS[$job]:-}"
    set -- "${words[@]}"
    while (($# > 1)); do
        case $1 in
        --no-bind) shift && continue ;;
        --add | --qemu-arg | --kernel) ;;
        *)
            [[ $values != *" $1="* || $values == *" $1=$2 "* ]] ||
                die "the tests of the boot $job disagree on $1; see '# options:' in${JOB_FILES[$job]}"
            values+="$1=$2 "
            ;;
        esac
        shift 2
    done
}

# in_host JOB LOG FILE…: boots a host for these files. run-tests marks where each begins and ends.
in_host() {
    local job=$1 log=$2 options=()
    shift 2
    read -r -a options <<<"${JOB_OPTIONS[$job]:-}"
    "$TESTBED_ROOT/scripts/testbed" run --profile "${job#*@}" --timeout $((FILE_TIMEOUT * $# + 60)) "${options[@]}" -- \
        run-tests "$FILE_TIMEOUT" "$@" >"$log" 2>&1
}

# run_boot JOB: runs its files in as few boots as possible. After a file that failed, the host's state is unknown, so the rest
# run in a fresh boot. The same holds after a file that ended the host. If a fault of the emulation ended a file (see
# one_processor), that file runs once more.
run_boot() {
    local job=$1 profile=${1#*@} rest=() boots=0 log status name ended collected tried='' began
    read -r -a rest <<<"${JOB_FILES[$job]}"
    while ((${#rest[@]})); do
        boots=$((boots + 1)) status=0 collected=0 began=$SECONDS
        log=$LOGS/boot-${job/@/-}-$boots.log
        in_host "$job" "$log" "${rest[@]}" || status=$?
        part $((SECONDS - began)) "a host on $profile: ${rest[*]}"
        for name in "${rest[@]}"; do
            ended=$(sed -n "s/^run-tests: $name ended //p" "$log")
            [[ -n $ended ]] || break
            sed "0,/^run-tests: $name begins\$/d; /^run-tests: $name ended /,\$d" "$log" >"$(host_log "$name" "$profile")"
            part "${ended#* }" "  $name on $profile"
            echo "${ended% *}" >"$WORK/$name@$profile.status"
            collected=$((collected + 1))
        done
        rest=("${rest[@]:collected}")
        ((${#rest[@]})) || return 0
        name=${rest[0]}
        if grep -qx "run-tests: $name begins" "$log"; then
            sed "0,/^run-tests: $name begins\$/d" "$log" >"$(host_log "$name" "$profile")"
        elif ((collected)); then
            continue
        else
            cp "$log" "$(host_log "$name" "$profile")"
        fi
        if ((status == 125)) && [[ $tried != "$name" ]] && grep -qE "the host's kernel panicked|the host hangs" "$log"; then
            say "$name on $profile: the emulated host's kernel panicked or hung; running the test once more"
            tried=$name
            continue
        fi
        echo "$((status ? status : 1))" >"$WORK/$name@$profile.status"
        rest=("${rest[@]:1}")
    done
}

run_outside() {
    local name=$1 status=0 began=$SECONDS
    bash "$TESTBED_ROOT/tests/outside/$name.sh" >"$LOGS/outside-$name.log" 2>&1 || status=$?
    part $((SECONDS - began)) "$name, from outside"
    echo "$status" >"$WORK/outside-$name.status"
}

# Lists of processors, separated by blanks. Hosts run on EARLY while Cargo works on REST, and later on LANE. Memory limits how
# many hosts run side by side. Each host keeps one processor busy.
plan_processors() {
    local all=() memory lanes early
    readarray -t all < <(processors)
    memory=$(awk -v "each=$HOST_MEMORY" '/^MemAvailable/ { print int($2 / each) }' /proc/meminfo)
    lanes=$((memory < 1 ? 1 : memory > 4 ? 4 : memory))
    lanes=$((lanes < ${#all[@]} ? lanes : ${#all[@]}))
    early=$((${#all[@]} / 2 < lanes ? ${#all[@]} / 2 : lanes))
    ALL_PROCESSORS="${all[*]}" EARLY_PROCESSORS="${all[*]:0:early}" REST_PROCESSORS="${all[*]:early}"
    LANE_PROCESSORS="${all[*]:0:lanes}"
}
# processors_of LIST: the list in the format of taskset.
processors_of() { tr ' ' , <<<"$1"; }
# leave_processors_to_hosts: restricts this shell and what it starts from now on to the processors without hosts.
leave_processors_to_hosts() {
    [[ -e $WORK/hosts && -n $EARLY_PROCESSORS ]] || return 0
    taskset --cpu-list --pid "$(processors_of "$REST_PROCESSORS")" "$BASHPID" >/dev/null
}

# lane PROCESSOR: waits until the testbed is built, then runs the jobs that no other lane has begun.
lane() {
    local processor=$1 job name
    until [[ -s $WORK/testbed ]]; do sleep 0.5; done
    : >"$WORK/hosts"
    taskset --cpu-list --pid "$processor" "$BASHPID" >/dev/null
    for job in "${JOBS[@]}"; do
        mkdir "$WORK/${job/\//-}.job" 2>/dev/null || continue
        if (($(<"$WORK/testbed"))); then
            for name in ${JOB_FILES[$job]}; do not_built "$job" "$name"; done
        elif [[ $job == outside/* ]]; then
            run_outside "${job#outside/}"
        else
            run_boot "$job"
        fi
    done
}
not_built() {
    local log=$LOGS/outside-$2.log status=$WORK/outside-$2.status
    [[ $1 == outside/* ]] || { log=$(host_log "$2" "${1#*@}") && status=$WORK/$2@${1#*@}.status; }
    echo "the testbed is not built; see $LOGS/testbed-build.log" >"$log"
    echo 125 >"$status"
}

# early_lanes_start: starts lanes on one half of the processors. late_lanes_start: starts lanes on the others.
LANES=() LANES_ON=' ' EARLY_PROCESSORS=''
start_lane() {
    [[ $LANES_ON != *" $1 "* ]] || return 0
    lane "$1" &
    LANES+=($!) LANES_ON+="$1 "
}
early_lanes_start() {
    local processor
    plan_processors
    for processor in $EARLY_PROCESSORS; do start_lane "$processor"; done
    # With the kernel in the cache, hosts boot at once.
    [[ ! -s $WORK/testbed ]] || : >"$WORK/hosts"
}
late_lanes_start() {
    local processor
    [[ -n ${LANE_PROCESSORS:-} ]] || plan_processors
    taskset --cpu-list --pid "$(processors_of "$ALL_PROCESSORS")" "$BASHPID" >/dev/null
    for processor in $LANE_PROCESSORS; do start_lane "$processor"; done
}

# judge_jobs: waits for all jobs and reports them in their order.
judge_jobs() {
    local job name
    for job in "${JOBS[@]}"; do
        for name in ${JOB_FILES[$job]}; do
            if [[ $job == outside/* ]]; then
                judge_when_ended "$WORK/outside-$name.status" "$LOGS/outside-$name.log" "$name, from outside" "$name"
            else
                judge_when_ended "$WORK/$name@${job#*@}.status" "$(host_log "$name" "${job#*@}")" \
                    "$name on ${job#*@}" "$name on ${job#*@}"
            fi
        done
    done
    wait "${LANES[@]}" || true
}
judge_when_ended() {
    local status=$1 log=$2
    say "$3"
    while [[ ! -s $status ]] && lanes_run; do sleep 0.5; done
    [[ -s $status ]] || echo 1 >"$status"
    [[ -e $log ]] || : >"$log"
    judge "$4" "$log" "$(<"$status")"
}
lanes_run() {
    local lane
    for lane in "${LANES[@]}"; do ! kill -0 "$lane" 2>/dev/null || return 0; done
    return 1
}
