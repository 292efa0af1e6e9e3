"""A real OpenSSH server on 127.0.0.1 with keys, config and folders of its own: a board, for tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
SSH = shutil.which("ssh")
MISSING = "" if SSH and SSHD else "no OpenSSH client and server here; Debian has openssh-client and openssh-server"


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sshd:
    """The server. `bin` is a folder for the front of PATH, with an `ssh` that reads this server's client config.

    `tmp` is the TMPDIR of whoever logs in. The client's config has the alias `board`.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.port, self.user = folder, _free_port(), getpass.getuser()
        self.tmp, self.bin = folder / "board-tmp", folder / "bin"
        self.tmp.mkdir()
        self.bin.mkdir()
        host, user = _key(folder / "host_key"), _key(folder / "user_key")
        self.stranger = _key(folder / "stranger_key")
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        self.known_hosts = folder / "known_hosts"
        public = (folder / "host_key.pub").read_text()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public}")
        self.environment = {"TMPDIR": str(self.tmp), **(environment or {})}
        self._server_config(host)
        self.client_config(user)
        ssh = self.bin / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {SSH} -F {folder / "config"} "$@"\n')
        ssh.chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}"

    def _server_config(self, host_key: Path) -> None:
        settings = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        self.folder.joinpath("sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {host_key}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nStrictModes no\nPermitRootLogin yes\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\nSetEnv {settings}\n"
        )

    def client_config(self, key: Path) -> None:
        """Write the client's config, with this key to log in."""
        self.folder.joinpath("config").write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n  User {self.user}\n"
            f"Host *\n  IdentityFile {key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.known_hosts}\n  GlobalKnownHostsFile /dev/null\n"
        )

    def start(self) -> None:
        if os.geteuid() == 0:
            # sshd wants it; Debian's service makes it at boot, which a container has not.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError("sshd does not start: " + (self.folder / "sshd.log").read_text()[-2000:])

    def stop(self) -> None:
        """No new connections; those that are stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def sessions(self) -> list[psutil.Process]:
        """Every process of every login."""
        if self._process is None:
            return []
        found: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
        return found

    def cut(self) -> None:
        """End the connections only, as a pulled cable does; what runs on the board stays."""
        self._kill([p for p in self.sessions() if self._name(p).startswith("sshd")])

    def reboot(self) -> None:
        """End everything on the board at once, then start it again with an empty TMPDIR."""
        sessions = self.sessions()
        self.stop()
        self._kill(sessions)
        shutil.rmtree(self.tmp)
        self.tmp.mkdir()
        self.start()

    @staticmethod
    def _name(process: psutil.Process) -> str:
        with contextlib.suppress(psutil.Error):
            return str(process.name())
        return ""

    @staticmethod
    def _kill(processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def wait_for_run(self, patience_s: float = 90) -> Path:
        """The executable that runs on the board, once one does."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            for process in self.sessions():
                with contextlib.suppress(psutil.Error):
                    if Path(process.exe()).parent.parent == self.tmp:
                        return Path(process.exe())
            time.sleep(0.01)
        raise RuntimeError("nothing runs on the board")

    def left_over(self, patience_s: float = 30) -> list[str]:
        """What lies or runs on the board after `patience_s` at most; a well-behaved client leaves nothing."""
        deadline = time.monotonic() + patience_s
        while True:
            files = [str(p) for p in self.tmp.iterdir()]
            running = []
            for process in psutil.process_iter(["exe"]):
                if str(process.info["exe"] or "").startswith(str(self.tmp)):
                    running.append(f"process {process.pid}")
            if not (files or running) or time.monotonic() > deadline:
                return files + running
            time.sleep(0.05)


@contextlib.contextmanager
def sshd(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Sshd]:
    """A running server, ended with all its logins."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(stat.S_IRWXU)
    server = Sshd(folder, environment)
    server.start()
    try:
        yield server
    finally:
        sessions = server.sessions()
        server.stop()
        server._kill(sessions)
