"""The model of ordinary attention that a T6 is compared with."""

from transformers import MistralConfig, PreTrainedConfig


def mha_twin(config: PreTrainedConfig) -> MistralConfig:
    """A Llama-like model of the same shape with as many key/value heads as heads (Llama's own wants h to divide sizes)."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "max_position_embeddings",
    )
    shape = {name: getattr(config, name) for name in names}
    heads = config.num_attention_heads
    return MistralConfig(**shape, num_key_value_heads=heads, sliding_window=None, bos_token_id=None, eos_token_id=None)
