"""mulsched: which LLM serving instance should this request go to?"""

from mulsched._backend import BACKEND
from mulsched.block_keys import block_keys, text_block_keys
from mulsched.errors import *  # noqa: F403
from mulsched.prefix_index import PrefixIndex
from mulsched.types import BlockRemoved, BlockStored, CacheCleared, InstanceRemoved, Namespace, Request

__all__ = [
    "BACKEND",
    "BlockRemoved",
    "BlockStored",
    "CacheCleared",
    "InstanceRemoved",
    "Namespace",
    "PrefixIndex",
    "Request",
    "block_keys",
    "text_block_keys",
]
