"""The model that real vLLM engines on a CPU are tried with: a Llama with weights that do not matter."""

from typing import Any

START_S = 900  # a start takes 45 s on two idle cores, minutes on busy ones


def tiny_llama(vocabulary: int) -> dict[str, Any]:
    """Return its ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
