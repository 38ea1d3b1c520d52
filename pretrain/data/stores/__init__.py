"""Where shard sets lie, by URL scheme: a folder, http(s)://, s3://, gs://.

A `Store` gives the files of one set by their manifest's entries. What is remote is read by `obstore`, with credentials,
region and endpoint from the environment (AWS_*, GOOGLE_*), and kept in a `Cache` on the node's own disk. Every failure
of a store is a `UserError` that names the URL: `DamagedError` where the data is not what the manifest says,
`UnreachableError` where nothing can be said about it.

Clients of remote stores run threads that do not survive a fork: open a store in the process that reads from it.
"""

from pretrain.data.stores.cache import NoRoomError
from pretrain.data.stores.config import Location, StoreConfig, is_remote, parse_location
from pretrain.data.stores.errors import DamagedError, UnreachableError
from pretrain.data.stores.store import LocalStore, Store, open_store

__all__ = [
    "DamagedError",
    "LocalStore",
    "Location",
    "NoRoomError",
    "Store",
    "StoreConfig",
    "UnreachableError",
    "is_remote",
    "open_store",
    "parse_location",
]
