"""Who may come in: the token, and the address that a server listens on."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from mrl.errors import ConfigError

TOKEN = "MRL_TOKEN"


def read_token(token_file: Path | str | None) -> str | None:
    """The token from a file, or from the environment variable MRL_TOKEN; None where there is none.

    Raises:
        ConfigError: the file is not there or empty, or the token is shorter than 16 characters, or has others than a header
            can carry (visible ASCII).

    Example:
        >>> _ = os.environ.pop("MRL_TOKEN", None)
        >>> read_token(None) is None
        True
    """
    token = os.environ.get(TOKEN)
    if token_file is not None:
        try:
            token = Path(token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {token_file}: cannot be read ({error}).") from error
    if token is None:
        return None
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            "the token has spaces or letters that HTTP does not carry; take one like `openssl rand -hex 24`."
        )
    if len(token) < 16:
        raise ConfigError("the token is shorter than 16 characters; take a longer one, such as `openssl rand -hex 24`.")
    return token


def check_address(host: str, token: str | None) -> None:
    """Refuses an address that others can reach, without a token.

    Raises:
        ConfigError: such an address, or none at all.

    Example:
        >>> check_address("127.0.0.1", None)
        >>> check_address("0.0.0.0", None)
        Traceback (most recent call last):
        mrl.errors.ConfigError: --host 0.0.0.0: others can reach it; set MRL_TOKEN or --token-file, or use 127.0.0.1.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and token is None:
        raise ConfigError(f"--host {host}: others can reach it; set {TOKEN} or --token-file, or use 127.0.0.1.")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything is said of serving.

    Args:
        host: an address of this machine, or its name.
        port: of the address.

    Raises:
        ConfigError: not an address of this machine, or a port that another program has.

    Example:
        >>> with listen("127.0.0.1", 0) as one:
        ...     listen("127.0.0.1", one.getsockname()[1])
        Traceback (most recent call last):
        mrl.errors.ConfigError: --host 127.0.0.1 --port ...: cannot listen there (Address already in use); use a free port, ...
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)  # localhost: 127.0.0.1 before ::1
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no name server takes
        known = getattr(error, "errno", None) or 0
        reason = os.strerror(known) if known > 0 else getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({reason}); use a free port, and an address of "
            "this machine."
        ) from error
