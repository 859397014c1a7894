"""A PostgreSQL of one's own in a temporary folder, for tests; it runs as a user that is not root."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def binaries():
    """The folder of initdb and postgres, or None."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    return next((p for p in (*debian, *places) if (p / "initdb").exists() and (p / "postgres").exists()), None)


def plain_user():
    """A user that PostgreSQL may run as: this one, or postgres or nobody where this is root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextlib.contextmanager
def cluster():
    """Starts a cluster that listens on loopback only; yields its URL."""
    place, user = binaries(), plain_user()
    folder = Path(tempfile.mkdtemp(prefix="mrl-postgres-"))
    who = {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    if user is not None:
        shutil.chown(folder, user)
    quiet = {
        "stdout": subprocess.DEVNULL,
        "cwd": folder,
        "env": {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(folder)},
        **who,
    }
    server = None
    try:
        init = [place / "initdb", "-D", folder / "data", "-U", "mrl", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(list(map(str, init)), check=True, stderr=subprocess.PIPE, **quiet)
        port = free_port()
        words = [place / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", port, "-k", "", "-F"]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(list(map(str, words)), stderr=log, **quiet)
        _wait(server, port, folder / "log")
        yield f"postgresql://mrl@127.0.0.1:{port}/postgres"
    finally:
        if server is not None:
            server.terminate()  # SIGTERM: a smart shutdown would wait for clients
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait(server, port, log):
    import pg8000.dbapi

    end = time.monotonic() + 120
    while True:
        try:
            pg8000.dbapi.connect("mrl", host="127.0.0.1", port=port, database="postgres").close()
            return
        except (pg8000.dbapi.Error, OSError):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
