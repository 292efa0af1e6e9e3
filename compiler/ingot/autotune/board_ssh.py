"""A board behind ssh: one connection per batch, by the system's OpenSSH, and nothing left behind.

The user's agent, keys, config and known_hosts decide whether and how the connection is made; ingot never answers a
question for the user and never accepts a host key. The executable travels as standard input of a small script for
`sh`, which puts it into a folder of its own, runs it, and removes the folder. Standard input then stays open: its end
means that whoever asked is gone (a timeout, Ctrl-C, a kill, a lost network), and the script ends the executable.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.autotune.board import Kind, Outcome, Unit
from ingot.autotune.board_local import check_executable, describe_status
from ingot.autotune.process import MAX_OUTPUT_BYTES, Finished, run_limited
from ingot.errors import BoardError, ToolchainError
from ingot.native import cpu_features

if TYPE_CHECKING:
    from ingot.target import Target

#: What `uname -m` may say on a board of the architecture. A 64-bit ARM kernel may have a 32-bit userland.
_MACHINES = {
    "x86_64": "x86_64 amd64",
    "aarch64": "aarch64 arm64",
    "arm": "armv7l armv8l aarch64",
    "riscv64": "riscv64",
}
_OPTIONS = (
    *("-T", "-x", "-a"),
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", "ClearAllForwardings=yes"),
    *("-o", "PermitLocalCommand=no"),
    *("-o", "RemoteCommand=none"),
    *("-o", "LogLevel=ERROR"),
)
#: Seconds to connect and log in, seconds for a dead connection to be noticed, and the slowest copying waited for.
_CONNECT_S, _SILENCE_S, _BYTES_PER_S = 30.0, 20.0, 50_000

# $1: what its own lines on standard error begin with, which the executable cannot know. $2: bytes to come, 0 to look
# at the board only. $3: machines. $4: seconds of CPU time. The rest: the executable's arguments.
# A folder that cannot run programs (mounted noexec) or is too small is passed over.
_SCRIPT = r"""
nonce=$1 size=$2 machines=$3 seconds=$4
shift 4
umask 077
say() { echo "$nonce $*" >&2; }
say begin
machine=$(uname -m)
case " $machines " in *" $machine "*) ;; *) say wrong_arch "$machine"; exit 0 ;; esac
d= why=refused
drop() { [ -z "$d" ] || rm -rf "$d"; d=; }
trap drop EXIT
trap "" HUP PIPE
trap "exit 1" INT TERM
for base in "${TMPDIR:-/tmp}" /tmp /var/tmp "$HOME" /dev/shm; do
    [ -d "$base" ] || continue
    if ! d=$(mktemp -d "$base/ingot.XXXXXXXXXX" 2>&1); then
        case $d in *"No space"* | *quota*) why=disk_full ;; esac
        d=
        continue
    fi
    if ! printf "#!/bin/sh\nexit 0\n" >"$d/try"; then why=disk_full; drop; continue; fi 2>/dev/null
    chmod 700 "$d/try"
    if ! "$d/try"; then drop; continue; fi 2>/dev/null
    free=$(df -Pk "$d" 2>/dev/null | { read -r _; read -r _ _ _ free _; echo "$free"; })
    case $free in
        "" | *[!0-9]*) break ;;
        *) [ "$free" -le $((size / 1024 + 64)) ] || break ;;
    esac
    why=disk_full
    drop
done
[ -n "$d" ] || { say "$why"; exit 0; }
if [ "$size" -eq 0 ]; then
    say ready "$machine"
    grep -iE "^(flags|features|model name|model|processor)[[:space:]]*:" /proc/cpuinfo
    exit 0
fi
head -c "$size" >"$d/run"
[ "$(wc -c <"$d/run")" -eq "$size" ] || { say disk_full; exit 0; }
chmod 700 "$d/run"
exec 3<&0 </dev/null
say start
(ulimit -c 0; ulimit -t "$seconds"; exec "$d/run" "$@") 3<&- &
pid=$!
(read -r _ <&3; kill -9 "$pid") >/dev/null 2>&1 &
watch=$!
wait "$pid"
status=$?
kill "$watch"
say exit "$status"
"""


@dataclass(frozen=True)
class _Said:
    """What the script said: the last of its words, and whether the executable was started."""

    words: tuple[str, ...]
    began: bool
    started: bool
    #: What else came on standard error: of ssh, the shell and the executable.
    other: str


def _read(done: Finished, nonce: str) -> _Said:
    said, other = [], []
    for line in done.errors.decode("utf-8", "replace").splitlines():
        mine, found, words = line.rpartition(f"{nonce} ")
        if found:
            said.append(tuple(words.split()))
        if text := "".join(c for c in mine if c.isprintable()).strip() if found else line.strip():
            other.append("".join(c for c in text if c.isprintable())[:200])
    return _Said(said[-1] if said else (), bool(said), ("start",) in said, other[-1] if other else "")


class SshBoard:
    """The board at `host`, a name or address that `ssh` understands (an alias of the user's config too)."""

    unit: Unit = "ns"
    size = 1

    def __init__(self, host: str, user: str | None, port: int | str | None, target: Target) -> None:
        address = f"[{host}]" if ":" in host else host
        self.name = f"ssh://{f'{user}@' if user else ''}{address}{f':{port}' if port else ''}"
        self._target = target
        self._login = (*(("-l", user) if user else ()), *(("-p", str(port)) if port else ()), "--", host)
        if shutil.which("ssh") is None:
            hint = "install OpenSSH's client, on Debian and Ubuntu: apt install openssh-client"
            raise ToolchainError("ssh is not installed", where=f"--board {self.name}", hint=hint)

    def probe(self) -> str:
        """Log in and look: architecture, CPU features, a folder to write in. Raises BoardError where one is missing."""
        done, said = self._call(b"", (), 30.0)
        target, where = self._target, f"--board {self.name}"
        if said.words[:1] != ("ready",):
            outcome = self._failure(done, said)
            raise BoardError(_COMPLAINTS[outcome.kind], where, outcome.detail, hint=_hint(outcome.detail, self._login))
        cpuinfo = "\n".join(done.lines())
        # RISC-V's kernels do not tell all they have.
        features = target.features if target.arch == "riscv64" else cpu_features(target.arch, cpuinfo)
        missing = [feature for feature in target.features if feature not in features]
        if missing:
            hint = "tune for the target that the board is: ingot targets"
            raise BoardError("the board's CPU lacks features of the target", where, ", ".join(missing), hint=hint)
        keys = [line.partition(":")[0].strip().lower() for line in done.lines()]
        cores = sum(key == "processor" for key in keys)
        return f"{said.words[1]}, {cores} cores" if cores else said.words[1]

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        """Copy it to the board, run it there, remove it."""
        try:
            wrong = check_executable(executable, self._target)
            if wrong:
                return wrong
            done, said = self._call(executable.read_bytes(), arguments, timeout_s)
        except OSError as error:
            return Outcome("refused", (), f"it cannot be sent: {error.strerror}")
        if done.stopped == "output":
            return Outcome("crash", done.lines(), f"stopped: it wrote more than {MAX_OUTPUT_BYTES >> 20} MiB")
        if said.words[:1] != ("exit",):
            return self._failure(done, said)
        return _judge(done, said, timeout_s)

    def _call(self, data: bytes, arguments: Sequence[str], timeout_s: float) -> tuple[Finished, _Said]:
        nonce = secrets.token_hex(16)
        words = [nonce, str(len(data)), _MACHINES[self._target.arch], str(int(timeout_s) * 64 + 60), *arguments]
        command = shlex.join(["sh", "-c", _SCRIPT, "ingot", *words])
        done = run_limited(
            ["ssh", *_OPTIONS, *self._login, command],
            timeout_s=timeout_s,
            feed=data,
            grace_s=_SILENCE_S,
            marker=f"{nonce} start\n".encode(),
            start_s=_CONNECT_S + len(data) / _BYTES_PER_S,
        )
        return done, _read(done, nonce)

    def _failure(self, done: Finished, said: _Said) -> Outcome:
        """The outcome where the executable did not run to an end that the board told."""
        word = said.words[0] if said.words else ""
        if word == "wrong_arch":
            found = " ".join(said.words[1:])[:40]
            return Outcome("wrong_arch", (), f"the board is {found}, the target {self._target.arch}")
        if word == "disk_full":
            return Outcome("disk_full", (), "no folder of the board has room for the executable")
        if word == "refused":
            return Outcome("refused", (), "no folder of the board takes a program: /tmp, /var/tmp, home, /dev/shm")
        if not said.began:
            silence = f"no answer in {_CONNECT_S:g} s" if done.stopped else f"ssh ended with status {done.status}"
            return Outcome("refused", (), said.other or silence)
        detail = "the board stopped answering" if done.stopped else said.other or "the connection ended"
        return Outcome("lost", done.lines(), detail)


_COMPLAINTS: dict[Kind, str] = {
    "refused": "the board refuses the connection",
    "lost": "the connection to the board is lost",
    "disk_full": "the board's disk is full",
    "wrong_arch": "the board is not of the target's kind",
}


def _hint(detail: str, login: Sequence[str]) -> str | None:
    """What to do about a message of ssh's."""
    by_hand = shlex.join(["ssh", *(word for word in login if word != "--")])
    if "Host key verification failed" in detail:
        return f"connect once by hand, and compare the key it shows: {by_hand}"
    if "Permission denied" in detail:
        return f"let it in without a password, with a key or an agent: ssh-copy-id, then try: {by_hand}"
    return f"see whether this works: {by_hand}" if "folder" not in detail and "target" not in detail else None


def _judge(done: Finished, said: _Said, timeout_s: float) -> Outcome:
    """The outcome of an executable whose end the board told."""
    lines, code = done.lines(), said.words[1] if len(said.words) > 1 else ""
    status = int(code) if code.isdigit() and len(code) < 4 else 255
    # A shell says 128 + n for signal n; 24 is SIGXCPU: its CPU time was over.
    if done.stopped == "timeout" or status == 128 + 24:
        return Outcome("timeout", lines, f"stopped after {timeout_s:g} s")
    if status == 0:
        return Outcome("ok", lines, "")
    # The shell's words for a file of the right architecture that the system cannot start: its loader is missing, or a
    # 64-bit kernel has no 32-bit programs. Some shells then take it for a script, and complain of its syntax.
    if not lines and (status in (126, 127) or (status == 2 and "yntax" in said.other)):
        return Outcome("wrong_arch", (), f"the board cannot start it ({said.other})")
    return Outcome("crash", lines, describe_status(128 - status if status > 128 else status, said.other))
