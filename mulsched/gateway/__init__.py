"""OpenAI's API in front of many engines: ``mulsched serve``. Extra ``mulsched[gateway]``."""

from mulsched.gateway.config import EngineConfig, GatewayConfig
from mulsched.gateway.gateway import Gateway
from mulsched.gateway.prompts import PromptReader, load_tokenizer

__all__ = ["EngineConfig", "Gateway", "GatewayConfig", "PromptReader", "load_tokenizer"]
