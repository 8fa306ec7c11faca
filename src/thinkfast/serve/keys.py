"""API keys from a file of hashes, and how often each may ask."""

from __future__ import annotations

import hashlib
import math
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thinkfast.errors import BadInput
from thinkfast.serve.wire import Refused


class Key(BaseModel):
    """A `[[key]]` of the file: a name for the logs, the SHA-256 of the key in hex, and requests a minute."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: float = Field(60.0, gt=0)


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: list[Key] = Field(min_length=1)


class Keys:
    """Who may ask, each with a bucket that holds a minute's requests and fills steadily."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = {key.sha256: key for key in keys}
        self._left = {key.sha256: (key.requests_per_minute, time.monotonic()) for key in keys}

    def admit(self, authorization: str, counts: bool) -> str:
        """The name behind an Authorization header. `counts`: the request takes from the key's bucket.

        Raises Refused: 401 for a missing or unknown key, 429 for one that asks too often.
        """
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Refused(401, "no API key: expected a header 'Authorization: Bearer KEY'", code="missing_api_key")
        # Looked up by its hash: how long that takes tells nothing about the keys.
        digest = hashlib.sha256(secret.strip().encode("utf-8", "replace")).hexdigest()
        key = self._keys.get(digest)
        if key is None:
            raise Refused(401, "this API key is not known", code="invalid_api_key")
        if counts:
            self._take(digest, key)
        return key.name

    def _take(self, digest: str, key: Key) -> None:
        (left, then), now = self._left[digest], time.monotonic()
        rate = key.requests_per_minute / 60
        left = min(max(key.requests_per_minute, 1.0), left + (now - then) * rate)
        if left < 1:
            self._left[digest] = (left, now)
            wait = math.ceil((1 - left) / rate)
            told = f"this key may ask {key.requests_per_minute:g} times a minute"
            raise Refused(429, told, code="rate_limit_exceeded", retry=wait)
        self._left[digest] = (left - 1, now)


def load_keys(path: Path) -> Keys:
    """Reads a TOML file of keys. Raises BadInput naming the file and the field."""
    if not path.is_file():
        raise BadInput(f"{path}: no key file there")
    try:
        raw: Mapping[str, object] = tomllib.loads(path.read_text("utf-8"))
        found = KeyFile.model_validate(raw).key
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in found]
        double = next((value for value in values if values.count(value) > 1), None)
        if double is not None:
            raise BadInput(f"{path}: {field} {double!r} occurs twice, expected each once")
    return Keys(found)
