"""Maglev's seed: the public one, or one that a secret in a file makes, of which nothing but a fingerprint is told."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from lb.maglev import DEFAULT_SEED
from xdp.errors import ConfigError

_SHORTEST, _LONGEST = 16, 4096  # bytes of a secret
_FOR_EVERYBODY = 0o007
_AROUND = b" \t\r\n"  # what editors add at the end, and no two of them alike
_MAKE = "`openssl rand -hex 32` makes one"


@dataclass(frozen=True)
class Seed:
    """A seed, and what may be told of it: nodes choose alike if their fingerprints are alike."""

    number: int = field(repr=False)  # of 64 bits
    fingerprint: str


PUBLIC = Seed(DEFAULT_SEED, "public")


def read_seed(path: Path | None) -> Seed:
    """Return the seed that the secret in a file makes, the public one without a file. ConfigError: there is no secret.

    Seed and fingerprint are two digests of the secret: neither can be had from the other.
    """
    if path is None:
        return PUBLIC
    secret = _secret(path)
    number = int.from_bytes(_digest(secret, b"seed"), "little")
    return Seed(number, _digest(secret, b"fingerprint")[:4].hex())


def _digest(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=8, person=purpose).digest()


def _secret(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            mode, data = os.fstat(stream.fileno()).st_mode, stream.read(_LONGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path given with --seed-file, or {_MAKE}") from None
    except OSError as error:
        raise ConfigError(f"{path}: the secret cannot be read: {error.strerror}") from None
    secret = data.strip(_AROUND)
    if mode & _FOR_EVERYBODY:
        raise ConfigError(f"{path}: everybody may read or write it, so it is no secret; `chmod o= {path}`")
    if len(data) > _LONGEST:
        raise ConfigError(f"{path}: is longer than {_LONGEST} bytes; is it the file with the secret?")
    if len(secret) < _SHORTEST:
        raise ConfigError(f"{path}: {len(secret)} bytes are no secret; expected {_SHORTEST} at least: {_MAKE}")
    return secret
