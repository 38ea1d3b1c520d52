"""Locations as recipes and commands give them, and the options of remote ones."""

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PlainValidator, PositiveFloat

SCHEMES = ("http", "https", "s3", "gs")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def parse_location(value: Any) -> Path | str:
    """A folder's Path, or a URL as text without slashes at its end, from a Path or text.

    Raises ValueError for a URL of another scheme, without a host or bucket, or with a query, and for other values.
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("write a folder's path, or its URL")
    match = _URL.fullmatch(value)
    if match is None:
        return Path(value)
    scheme, rest = match[1].lower(), match[2].rstrip("/")
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    if scheme not in SCHEMES:
        raise ValueError(f"{value}: {scheme}:// is not read; give a path, or {', '.join(f'{s}://' for s in SCHEMES)}")
    if not rest.partition("/")[0]:
        raise ValueError(f"{value}: names no {'host' if scheme.startswith('http') else 'bucket'}")
    if "?" in rest or "#" in rest:
        raise ValueError(f"{value}: a URL with a query (? or #) cannot be read, since names of files are added to it")
    return f"{scheme}://{rest}"


Location = Annotated[Path | str, PlainValidator(parse_location)]
"""A folder's path, or the URL of a folder: http(s)://, s3://, gs://."""


def is_remote(location: Path | str) -> bool:
    """Whether a location (after `parse_location`) is a URL."""
    return isinstance(location, str)


def default_cache_folder() -> Path:
    """A folder of this user among the node's temporary files."""
    return Path(tempfile.gettempdir()) / f"mnemosyne-cache-{os.getuid()}"


class StoreConfig(BaseModel):
    """How data at URLs is fetched and kept; local folders need none of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    cache_folder: Path | None = None
    """Folder on the node's own disk where what comes from URLs is kept, shared by its processes and by later runs;
    none: mnemosyne-cache-UID among the temporary files."""

    cache_gigabytes: NonNegativeFloat = 32.0
    """What the cache folder may hold, in 10^9 bytes; the shards used longest ago make room. Where the data does not
    fit, shards are fetched again and again, so give room for all of it, or for what is read at a time. 0: shards are
    not kept but read by byte ranges."""

    store_timeout_seconds: PositiveFloat = 30.0
    """Seconds without an answer or a byte after which a request to a URL counts as failed."""

    store_retries: NonNegativeInt = 6
    """How often in a row a failed request is tried again (after 0.5, 1, 2, ... seconds, 30 at most) before the run
    stops. A body that was cut goes on where it ended."""
