# Sourced by the other scripts of this folder, after `repo` is set: checks this machine, then makes or reuses the
# repository's own virtual environment. Leaves $venv and $python set.
#
#   INGOT_PYTHON   the python3 to use (default: the first of python3, python3.13 ... python3.10 that fits)
#   INGOT_VENV     where the environment lies (default: .venv in the repository)
# shellcheck shell=bash disable=SC2034

venv=${INGOT_VENV:-$repo/.venv}
python=$venv/bin/python
stamp=$venv/.ingot-ready     # holds the key of what was installed; written last, so a half-made environment has none
owned=$venv/.ingot-made      # written first: only an environment with this file is ever deleted
log=$repo/build/setup.log
debian_packages="qemu-user libc6-armhf-cross libc6-riscv64-cross gcc g++ make libc6-dev llvm openssh-client"
case $(uname -m) in aarch64 | arm64) ;; *) debian_packages="$debian_packages libc6-arm64-cross" ;; esac
# Tests start an sshd of their own on loopback. Where systemd runs, installing Debian's package would also start its
# service, which nobody asked for: there the tests use the sshd that is installed, or are skipped (not by CI).
[ -d /run/systemd/system ] && [ -z "${CI:-}" ] || debian_packages="$debian_packages openssh-server"

refuse() { # what, found, needed, what to do
    printf 'ingot cannot be set up here: %s\n  found:   %s\n  needed:  %s\n  to do:   %s\n' "$1" "$2" "$3" "$4" >&2
    exit 2
}

say() { printf '%s\n' "$*" >&2; }

check_system() {
    local system machine
    system=$(uname -s) machine=$(uname -m)
    [ "$system" = Linux ] || refuse "the operating system" "$system" "Linux" \
        "use a Linux machine, virtual machine or container"
    case $machine in
        x86_64 | amd64 | aarch64 | arm64) ;;
        *) refuse "the processor" "$machine" "x86-64 or aarch64" \
            "compile on such a machine; the compiled model itself runs on every board that 'ingot targets' lists" ;;
    esac
}

# Prints "major.minor.patch|libc|yes or no (venv can be made)|pointer bits" for the interpreter $1.
# shellcheck disable=SC2016
describe_python() {
    "$1" -I -c '
import os, struct, sys
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
except (ValueError, OSError):
    libc = "not glibc"
try:
    import ensurepip, venv
    able = "yes"
except ImportError:
    able = "no"
print("%d.%d.%d|%s|%s|%d" % (*sys.version_info[:3], libc, able, struct.calcsize("P") * 8))' 2>/dev/null
}

find_python() {
    local candidate facts seen="" minor
    host_python="" host_facts=""
    for candidate in ${INGOT_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        facts=$(describe_python "$candidate") || continue
        minor=${facts#3.}
        minor=${minor%%.*}
        case $facts in
            3.*\|64) if [ "$minor" -ge 10 ] && [ "$minor" -le 13 ]; then
                host_python=$candidate host_facts=$facts
                return
            fi ;;
        esac
        seen="$seen${seen:+, }$candidate is ${facts%%|*} (${facts##*|} bits)"
    done
    refuse "Python" "${seen:-no ${INGOT_PYTHON:-python3} on the PATH}" "64-bit Python 3.10, 3.11, 3.12 or 3.13" \
        "install one of them, or name it: INGOT_PYTHON=/path/to/python3.12 $0"
}

check_libc() {
    local libc=$1 version major minor
    version=${libc#glibc }
    major=${version%%.*}
    minor=${version#*.}
    minor=${minor%%.*}
    case $libc in
        "glibc "[0-9]*.[0-9]*) if [ "$major" -gt 2 ] || { [ "$major" -eq 2 ] && [ "$minor" -ge 28 ]; }; then return; fi ;;
    esac
    refuse "the C library" "$libc" "glibc 2.28 or newer" \
        "use a newer distribution (Debian 10, Ubuntu 20.04, RHEL 8 and later have it), or a container of one"
}

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && command -v dpkg-query >/dev/null 2>&1; }

# Installs Debian packages; says what failed and returns 1, because everything but python3-venv is optional.
apt_install() {
    local options=(-y -q --no-install-recommends -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2 -o Acquire::http::Timeout=30)
    export DEBIAN_FRONTEND=noninteractive
    watch_quietly "Debian packages: $*" apt-get "${options[@]}" install "$@" && return
    # The package lists may be missing (a fresh container) or old: fetch them once and try again.
    watch_quietly "Debian package lists" apt-get -q -o Acquire::Retries=2 -o Acquire::http::Timeout=30 update &&
        watch_quietly "Debian packages: $*" apt-get "${options[@]}" install "$@"
}

# Runs a command with its output in the log and one line of progress on the terminal: what, and for how long.
watch_quietly() {
    local what=$1 started=$SECONDS child status=0 doing
    shift
    mkdir -p "${log%/*}"
    printf '\n== %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    # shellcheck disable=SC2064
    trap "kill $child 2>/dev/null; wait $child 2>/dev/null; say; say 'stopped; the next run starts over cleanly'; exit 130" INT TERM
    if [ -t 2 ]; then
        while kill -0 "$child" 2>/dev/null; do
            doing=$(grep -aE '^(Collecting|Downloading|Building|Installing|Get:|Unpacking|Setting up) ?' "$log" | tail -n 1 | tr -d '\r' | cut -c1-60)
            # Without line wrapping while it is printed: a line that is too long is cut, not broken in two.
            printf '\r\033[K\033[?7l  %s, %d s  %s\033[?7h' "$what" $((SECONDS - started)) "$doing" >&2
            sleep 0.5
        done
        printf '\r\033[K' >&2
    fi
    wait "$child" || status=$?
    trap - INT TERM
    [ "$status" = 0 ] && say "  $what: done in $((SECONDS - started)) s"
    return "$status"
}

fail_with_log() { # what, what to do
    say "ingot could not be set up: $1"
    say "  the last lines of $log:"
    tail -n 25 "$log" | sed 's/^/    /' >&2
    say "  to do:   $2"
    exit 1
}

install_debian_packages() {
    local missing="" package
    if command -v dpkg-query >/dev/null 2>&1; then
        for package in $debian_packages; do
            case $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) in
                installed) ;;
                *) missing="$missing $package" ;;
            esac
        done
    elif ! command -v qemu-aarch64 >/dev/null 2>&1; then
        missing=" qemu-user"
    fi
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2086
    if can_apt; then
        apt_install $missing && return 0
        say "  Debian packages could not be installed (see $log):$missing"
    else
        say "  not installed, as that needs root and apt-get:$missing"
    fi
    say "  so tests that run ARM or RISC-V code, build C with gcc, or use ssh are reported as skipped"
}

make_environment() {
    local key=$1
    if [ -e "$venv" ] && [ ! -e "$owned" ]; then
        refuse "the environment's folder" "$venv, which these scripts did not make" "a folder of their own" \
            "move it away, or choose another folder: INGOT_VENV=/path/to/folder $0"
    fi
    # Reuse an environment that was once complete and has the same Python: only the requirements changed.
    if [ ! -f "$stamp" ] || [ "$(sed -n 2p "$stamp")" != "${host_facts%%|*}" ] || ! "$python" -c '' 2>/dev/null; then
        rm -rf "$venv"
        mkdir -p "$venv"
        : >"$owned"
        watch_quietly "Python environment" "$host_python" -m venv "$venv" ||
            fail_with_log "python3 -m venv failed" "see the lines above"
    fi
    rm -f "$stamp"
    watch_quietly "Python packages (about 400 MB to download)" "$python" -m pip install --progress-bar off \
        --disable-pip-version-check --no-input -e "${repo}[dev]" ||
        fail_with_log "pip install failed" "check the network (a proxy is set by https_proxy), then run $0 again"
    printf '%s\n%s\n' "$key" "${host_facts%%|*}" >"$stamp"
}

is_ready() { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$1" ] && "$python" -c '' 2>/dev/null; }

set_up() {
    local key rest
    check_system
    find_python
    rest=${host_facts#*|}
    check_libc "${rest%%|*}"
    unset PYTHONHOME PYTHONPATH
    # The folder is part of it because an environment cannot be moved, and the Debian packages because they may grow.
    key="$({ cat "$repo/pyproject.toml"; echo "$debian_packages"; } | sha256sum | cut -c1-64) ${host_facts%%|*} $repo"
    if is_ready "$key"; then return; fi
    mkdir -p "${log%/*}"
    # Two scripts started at once must not build the same environment: the second waits for the first.
    exec 9>"$repo/build/setup.lock"
    if command -v flock >/dev/null 2>&1; then flock 9; fi
    if ! is_ready "$key"; then
        : >"$log"
        say "setting up ingot in $venv (once; details in $log)"
        rest=${rest#*|}
        if [ "${rest%%|*}" != yes ]; then
            local package
            package="python$(echo "$host_facts" | cut -d. -f1,2)-venv"
            # shellcheck disable=SC2015
            can_apt && apt_install "$package" && [ "$(describe_python "$host_python" | cut -d'|' -f3)" = yes ] ||
                refuse "Python's venv module" "$host_python ${host_facts%%|*} without it" "python3-venv" \
                    "apt-get install $package (as root), then run $0 again"
        fi
        install_debian_packages
        make_environment "$key"
    fi
    exec 9>&-
}

set_up
