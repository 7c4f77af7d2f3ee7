"""OpenAI's API in front of many engines: ``mulsched serve``. Extra ``mulsched[gateway]``."""

from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.gateway import Gateway
from mulsched.prompt_reader import PromptReader
from mulsched.tokenizer import load_tokenizer

__all__ = ["EngineConfig", "Gateway", "GatewayConfig", "PromptReader", "load_tokenizer"]
