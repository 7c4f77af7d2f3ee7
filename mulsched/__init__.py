"""mulsched: which LLM serving instance should this request go to?"""

from mulsched._backend import BACKEND
from mulsched.block_keys import block_keys, text_block_keys
from mulsched.decision import Decision
from mulsched.errors import *  # noqa: F403
from mulsched.indicators import Columns
from mulsched.lifecycle import Lifecycle
from mulsched.policies import Policy
from mulsched.prefix_index import PrefixIndex
from mulsched.router import Router
from mulsched.scorers import Custom, Linear, Multiplicative
from mulsched.types import BlockRemoved, BlockStored, CacheCleared, InstanceRemoved, Namespace, Request

__all__ = [
    "BACKEND",
    "BlockRemoved",
    "BlockStored",
    "CacheCleared",
    "Columns",
    "Custom",
    "Decision",
    "InstanceRemoved",
    "Lifecycle",
    "Linear",
    "Multiplicative",
    "Namespace",
    "Policy",
    "PrefixIndex",
    "Request",
    "Router",
    "block_keys",
    "text_block_keys",
]
