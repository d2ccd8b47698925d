"""Who is calling? The one place that turns request headers into a class and a tenant.

The map is one JSON file, the same that `kvpilot.yaml` calls `callers`:

    {"classes": {"batch": 0, "interactive": 1}, "default": "batch", "header": "x-kvpilot-caller",
     "tenants": ["acme"], "keys": {"<SHA-256 of an API key>": {"class": "interactive", "tenant": "acme"}}}

Levels count from 0, lowest first, one class each. `header` (optional) names a header that a gateway sets and
that is believed: `class` or `class/tenant`. Otherwise the bearer key decides. Whoever is unknown gets the
default class (the lowest, if none is named) and no tenant. A tenant that the operator did not name, in
`tenants` or beside a key, appears as a hash salted with the file itself, so that no caller can write text of
its choice into our records.

`classify` never raises, whatever the headers hold, and costs a scan of them plus one SHA-256.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_CLASSES = 8
"""As many as telemetry has histograms for."""

MAX_NAME_BYTES = 32
"""Longest class or tenant name: what a lease's scope can name."""

MAX_FILE_BYTES = 16 * 1024 * 1024

NO_TENANT = ""
"""The tenant of a caller that nobody named."""

_MAX_CREDENTIAL_BYTES = 4096
_KEY_HEX = 64
_ENTRIES = {"classes", "default", "header", "keys", "tenants"}


class CallersError(ValueError):
    """The callers file cannot be used; the message is one line: where, what, what to do."""


class Tag(NamedTuple):
    """What the valve tells the engine about a request. `level` indexes the manifest's classes."""

    class_name: str
    level: int
    tenant: str


class Callers:
    """A loaded map; immutable."""

    def __init__(
        self,
        classes: Mapping[str, int],
        default: str | None = None,
        header: str | None = None,
        keys: Mapping[str, tuple[str, str]] | None = None,
        tenants: Iterable[str] = (),
        salt: bytes = b"",
    ) -> None:
        levels = _levels(classes)
        self.classes = levels
        """Class names by level, lowest first."""
        if default is not None and default not in classes:
            raise CallersError(f"default {default!r} is no class; name one of {', '.join(levels)}")
        self.default = Tag(default or levels[0], classes[default or levels[0]], NO_TENANT)
        self._tags = {name: Tag(name, level, NO_TENANT) for name, level in classes.items()}
        self._header = header.lower().encode("latin-1") if header is not None else None
        self._keys = {
            key: self._tags[name]._replace(tenant=tenant) for key, (name, tenant) in (keys or {}).items()
        }
        self._tenants = {*tenants, *(tag.tenant for tag in self._keys.values())} - {NO_TENANT}
        self._salt = salt

    @classmethod
    def load(cls, path: str | Path | None) -> "Callers":
        """Read the file; without one everybody is of one class, `default`. Raises CallersError."""
        if path is None:
            return cls({"default": 0})
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise CallersError(f"over {MAX_FILE_BYTES} bytes; keep one line a key")
            return cls._parse(json.loads(data), data)
        except OSError as error:
            raise CallersError(f"callers file {path}: {error.strerror or error}; check the path") from error
        except CallersError as error:
            raise CallersError(f"callers file {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CallersError(f"callers file {path}: not JSON: {error}") from error

    @classmethod
    def _parse(cls, raw: Any, data: bytes) -> "Callers":
        if not isinstance(raw, dict):
            raise CallersError("must hold one JSON object")
        unknown = sorted(raw.keys() - _ENTRIES)
        if unknown:
            raise CallersError(f"unknown entry {unknown[0]!r}; known: {', '.join(sorted(_ENTRIES))}")
        classes = raw.get("classes")
        if not isinstance(classes, dict):
            raise CallersError(
                '"classes" must map class names to levels, as in {"batch": 0, "interactive": 1}'
            )
        header = raw.get("header")
        if header is not None and not (isinstance(header, str) and header.isascii() and header.strip()):
            raise CallersError(f'"header" must be a header name or null, not {header!r}')
        default = raw.get("default")
        if default is not None and not isinstance(default, str):
            raise CallersError(f'"default" must be a class name, not {default!r}')
        tenants = raw.get("tenants", [])
        if not isinstance(tenants, list):
            raise CallersError('"tenants" must be a list of names')
        _levels(classes)
        return cls(
            classes,
            default,
            header.strip() if header else None,
            _keys(raw.get("keys", {}), classes),
            [_name(tenant, "tenant") for tenant in tenants],
            hashlib.sha256(data).digest(),
        )

    def classify(self, headers: Iterable[tuple[bytes, bytes]]) -> Tag:
        """The tag of a request with these raw headers (ASGI: names in lower case). Never raises."""
        credential = None
        for name, value in headers:
            if self._header is not None and name == self._header:
                return self._from_header(value)
            if name == b"authorization":
                credential = value
        if credential is None or not self._keys or len(credential) > _MAX_CREDENTIAL_BYTES:
            return self.default
        scheme, _, key = credential.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return self.default
        return self._keys.get(hashlib.sha256(key.strip()).hexdigest(), self.default)

    def _from_header(self, value: bytes) -> Tag:
        if len(value) > _MAX_CREDENTIAL_BYTES:
            return self.default
        name, _, tenant = value.strip().decode("utf-8", "replace").partition("/")
        tag = self._tags.get(name, self.default)
        return tag._replace(tenant=self._tenant(tenant)) if tenant else tag

    def _tenant(self, name: str) -> str:
        if name in self._tenants:
            return name
        return "h-" + hashlib.sha256(self._salt + name.encode("utf-8", "replace")).hexdigest()[:12]


def _levels(classes: Mapping[str, int]) -> tuple[str, ...]:
    """The names by level; levels must be 0, 1, 2, ..., each once."""
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise CallersError(f"{len(classes)} classes; give between 1 and {MAX_CLASSES}")
    for name, level in classes.items():
        _name(name, "class")
        if type(level) is not int:
            raise CallersError(f"class {name!r}: level must be a whole number, not {level!r}")
    ordered = sorted(classes, key=lambda name: classes[name])
    if [classes[name] for name in ordered] != list(range(len(classes))):
        raise CallersError("class levels must be 0, 1, 2, ... without gaps, each once, lowest class first")
    return tuple(ordered)


def _keys(raw: Any, classes: Mapping[str, int]) -> dict[str, tuple[str, str]]:
    if not isinstance(raw, dict):
        raise CallersError('"keys" must map the SHA-256 of an API key to {"class": ..., "tenant": ...}')
    keys = {}
    for number, (key, entry) in enumerate(raw.items(), 1):
        # Neither the key nor its hash goes into a message: a clear-text key here is the likely mistake.
        where = f"keys, entry {number}"
        if len(key) != _KEY_HEX or not set(key.lower()) <= set("0123456789abcdef"):
            raise CallersError(f"{where}: not a SHA-256 in hex (64 digits); never write the key itself")
        name = entry.get("class") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in classes:
            raise CallersError(f'{where}: needs a "class", one of {", ".join(classes)}')
        keys[key.lower()] = (
            entry["class"],
            _name(entry["tenant"], "tenant") if "tenant" in entry else NO_TENANT,
        )
    return keys


def _name(name: Any, kind: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable() or "/" in name:
        raise CallersError(f"{kind} name {name!r}: must be printable text without a slash")
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise CallersError(f"{kind} name {name[:16]!r}...: longer than {MAX_NAME_BYTES} bytes")
    return name
