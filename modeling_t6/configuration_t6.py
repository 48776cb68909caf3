# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""T6 model configuration"""

import math

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


# Far more than any model has. A damaged number would keep a computer busy for hours before anything failed.
MAX_LAYERS = 10_000

# Numbers that `rope_parameters` may hold, beside the lists `short_factor` and `long_factor`. Some may be `None` or 0.
ROPE_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
OPTIONAL_ROPE_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _is_positive(number) -> bool:
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return is_number and math.isfinite(number) and number > 0


@strict
class T6Config(PreTrainedConfig):
    r"""
    Configuration of a T6 model: a Llama-like decoder whose queries, keys and values are products of low-rank,
    contextual factors ("Tensor Product Attention Is All You Need", arXiv 2501.06425). The defaults are the paper's
    small model (124M parameters).

    Args:
        vocab_size (`int`, defaults to 50304): Number of tokens.
        hidden_size (`int`, defaults to 768): Size of the residual stream.
        intermediate_size (`int`, *optional*): Inner size of the SwiGLU; `floor(8 / 3 * hidden_size)` if `None`.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 34): Number of attention heads (h).
        num_key_value_heads (`int`, *optional*):
            Number of heads of keys and values (h_kv), `num_attention_heads` if `None`. With fewer, A_K and A_V are
            [R, h_kv], and the query heads of a group share a key and a value head, as in GQA.
        head_dim (`int`, defaults to 64): Size of a head (d), independent of `hidden_size`.
        q_rank (`int`, *optional*, defaults to 6):
            Rank of the queries (R_Q). `None` is TPA-KVonly: the queries come from one ordinary projection.
        k_rank (`int` or `list[int]`, defaults to 2): Rank of the keys (R_K), one for all layers or one for each.
        v_rank (`int` or `list[int]`, defaults to 2): Rank of the values (R_V), one for all layers or one for each.
        noncontextual_a (`bool`, defaults to `False`):
            Whether the A factors are learned constants [R, h] instead of projections of the token ("TPA with
            non-contextual A", section 4.1 of the paper). The cache then holds B alone. Llama's MHA, GQA and MQA are of
            this kind (section 4).
        cache_dtype (`str`, *optional*):
            What caches hold unless they or `generate()` are told otherwise: rows of 8 bits with `"float8_e4m3fn"`, of 4 with
            `"int4"`, of the model's dtype if `None`. While a model with rounded rows is trained, it makes no cache.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated MLP.
        max_position_embeddings (`int`, defaults to 1024): Longest sequence the model was made for.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation for every matrix but the factor, output and down projections (see `T6PreTrainedModel`).
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the RMS norms.
        rope_parameters (`dict`, *optional*):
            As in every Transformers model: `rope_theta`, `rope_type`, `partial_rotary_factor` and what the type needs.
        attention_bias (`bool`, defaults to `False`): Whether the attention projections have biases.
        attention_out_bias (`bool`, *optional*): Whether `o_proj` has one; `attention_bias` if `None`.
        mlp_bias (`bool`, defaults to `False`): Whether the projections of the MLP have biases.
        qk_norm (`bool` or `str`, defaults to `False`):
            Whether RMS norms of size d act on every head of the queries before RoPE, and on which part of the keys: with
            `True` on every row of B_K, as in a Qwen3 that is converted; with `"heads"` on every head that A_K and B_K form,
            as in a Qwen3 that is trained as T6, or converted with fewer keys (see `T6KeyHeadRMSNorm`).
        head_norm (`bool`, defaults to `False`):
            Whether an RMS norm (epsilon 1e-5) of size d acts on every head's output before `o_proj` ("groupnorm" in the
            research code).
        output_gate (`bool`, defaults to `False`):
            Whether the heads' outputs are multiplied by `sigmoid(W x)` [h, d] of the query token x, after `head_norm` and
            before `o_proj`. The paper names an output gate only (section 1); this is that of "Gated Attention for Large
            Language Models" (arXiv 2505.06708, after the attention, by head and element) and of "Forgetting Transformer"
            (arXiv 2503.02130, "Pro" block).
        sliding_window (`int`, *optional*): Tokens that a query of a `"sliding_attention"` layer sees, its own included.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer. `None`: sliding if there is a `sliding_window`. A
            window given later, at load or by assignment, acts on all layers if none is of full attention by name.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities.

    ```python
    >>> from modeling_t6 import T6Config, T6ForCausalLM

    >>> configuration = T6Config()
    >>> model = T6ForCausalLM(configuration)
    ```"""

    model_type = "t6"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 34
    num_key_value_heads: int | None = None
    head_dim: int = 64
    q_rank: int | None = 6
    k_rank: int | list[int] = 2
    v_rank: int | list[int] = 2
    noncontextual_a: bool = False
    noncontextual_b: bool = False
    shared_b: bool = False
    head_factor_act: str | None = None
    c_factor_dim: int | None = None
    cache_dtype: str | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    qk_norm: bool | str = False
    head_norm: bool = False
    output_gate: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None and isinstance(self.hidden_size, int):
            self.intermediate_size = 8 * self.hidden_size // 3
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None and isinstance(self.num_hidden_layers, int):
            if self.num_hidden_layers <= MAX_LAYERS:  # more are refused in the end
                self._layers_follow_window()
        self.base_model_tp_plan = self._tp_plan_of_any_engine()
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value):
        """Derived fields may be given, in a config.json or as arguments, but only with the value that they have."""
        derived = getattr(type(self), name, None)
        if isinstance(derived, property) and derived.fset is None:
            if value != getattr(self, name):
                raise ValueError(
                    f"`{name}` of a T6 model follows from its other fields and must be {getattr(self, name)!r} or left "
                    f"out, got {value!r}."
                )
            return
        if callable(derived) and not callable(value):  # a function in its place is someone's patch
            raise ValueError(f"`{name}` must be left out: it is a method of T6's configuration, got {value!r}.")
        is_change = "layer_types" in self.__dict__  # the last field, and all have been set before
        if is_change and name == "sliding_window":
            self._validate_window(value)
        has_groups = is_change and self.num_key_value_heads != self.num_attention_heads
        super().__setattr__(name, value)
        if is_change and name == "num_attention_heads" and not has_groups:
            self.num_key_value_heads = value
        elif is_change and name == "sliding_window":
            self._layers_follow_window()
        elif is_change and name == "layer_types" and value is None and self.sliding_window is not None:
            self._layers_follow_window()  # as if there had never been any

    def to_dict(self) -> dict:
        """Leaves out `num_key_value_heads` if it equals `num_attention_heads`, which may then be overridden at load."""
        output = super().to_dict()
        if output["num_key_value_heads"] == output["num_attention_heads"]:
            del output["num_key_value_heads"]
        return output

    def _layers_follow_window(self):
        """Unless `layer_types` names full attention, all layers are sliding if there is a window, else none."""
        if set(self.layer_types or ()) <= {"sliding_attention"}:
            has_window = self.sliding_window is not None
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers if has_window else None

    def fit_layers(self):
        """
        Called where a model is made: what is said for each layer follows another `num_hidden_layers` that was given at load or by
        assignment. Of fewer layers it is that of the first; more need all to be alike.

        Raises:
            ValueError: naming the field that does not follow, or any other with a wrong value.
        """
        for field in ("layer_types", "k_rank", "v_rank"):
            values, count = getattr(self, field), self.num_hidden_layers
            if isinstance(values, list) and len(values) != count and (len(values) > count or len(set(values)) == 1):
                setattr(self, field, (values + values[:1] * max(0, count - len(values)))[:count])
        try:
            self.validate()
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from None

    @property
    def heads_tp_plan(self) -> dict[str, str]:
        """
        The tensor parallel plan for the heads: shards the outputs of A projections, which are head-major, or the columns of
        constant A factors. Layers that are not named, such as B projections, are replicated.
        """
        suffix, style = ("_a", "rowwise") if self.noncontextual_a else ("_a_proj", "colwise")
        plan = {"q_proj": "colwise"} if self.q_rank is None else {f"q{suffix}": style}
        plan |= {f"k{suffix}": style, f"v{suffix}": style, "o_proj": "rowwise"}
        plan |= {"o_gate_proj": "colwise"} if self.output_gate else {}
        return {f"layers.*.self_attn.{name}": style for name, style in plan.items()}

    def _tp_plan_of_any_engine(self) -> dict[str, str]:
        """
        The plan for engines that know nothing but the plan. Constant A factors, which are not modules, and a softmax over all
        heads need code of the model, which only Transformers runs: for other engines their attention is replicated.
        """
        plan = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        plan = {f"layers.*.{name}": style for name, style in plan.items()}
        return plan if self.noncontextual_a or self.head_factor_act == "softmax" else self.heads_tp_plan | plan

    @property
    def num_key_value_groups(self) -> int:
        """Number of heads of queries that share a head of keys and one of values."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads`={self.num_attention_heads}, got "
                f"{self.num_key_value_heads}."
            )
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_local_heads(self) -> int:
        """Number of heads in this process: with tensor parallelism its share, else all."""
        return self._local_share("num_attention_heads")

    @property
    def num_local_key_value_heads(self) -> int:
        """Number of heads of keys and values in this process."""
        return self._local_share("num_key_value_heads")

    def _local_share(self, field: str) -> int:
        num_processes = getattr(getattr(self, "distributed_config", None), "tp_size", None) or 1
        return local_share(self, field, num_processes, "the number of processes")

    def ranks(self, layer_idx: int) -> tuple[int, int]:
        """R_K and R_V of a layer."""
        return tuple(rank if isinstance(rank, int) else rank[layer_idx] for rank in (self.k_rank, self.v_rank))

    def layer_type(self, layer_idx: int) -> str:
        """`"full_attention"` or `"sliding_attention"`."""
        return "full_attention" if self.layer_types is None else self.layer_types[layer_idx]

    @property
    def b_dim(self) -> int:
        """Size of a B factor: d, or d_b if there is a third factor."""
        return self.head_dim // (self.c_factor_dim or 1)

    @property
    def rotates_on_read(self) -> bool:
        """Whether the keys' B factors are cached before RoPE, or not at all, and are rotated where they are read."""
        return self.noncontextual_b or self.shared_b

    @property
    def rotary_dim(self) -> int:
        """Number of features of a B factor that RoPE rotates, as Transformers' RoPE functions count them."""
        return int(self.b_dim * (self.rope_parameters or {}).get("partial_rotary_factor", 1.0))

    def validate_architecture(self):
        """Part of `@strict`-powered validation: refuses sizes that no T6 model can have."""
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be a positive integer, got {getattr(self, field)}.")
        _ = self.num_key_value_groups  # which are whole
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {self.num_hidden_layers}.")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size`={self.vocab_size} or None, got {self.pad_token_id}."
            )
        if self.q_rank is not None and self.q_rank < 1:
            raise ValueError(
                f"`q_rank` must be a positive integer, or None for queries without factors (TPA-KVonly), got {self.q_rank}."
            )
        for field in ("k_rank", "v_rank"):
            rank = getattr(self, field)
            ranks = [rank] if isinstance(rank, int) else rank
            if min(ranks, default=0) < 1 or isinstance(rank, list) and len(rank) != self.num_hidden_layers:
                raise ValueError(
                    f"`{field}` must be a positive integer, or a list of one for each of the {self.num_hidden_layers} "
                    f"layers, got {rank}."
                )
        self._validate_variants()
        if not set(self.layer_types or ()) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"`layer_types` must be 'full_attention' or 'sliding_attention' for each layer, got {self.layer_types}."
            )
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("`layer_types` has 'sliding_attention', which needs a `sliding_window`, got None.")
        self._validate_window(self.sliding_window)
        if not _is_positive(self.rms_norm_eps):
            raise ValueError(f"`rms_norm_eps` must be a positive number, got {self.rms_norm_eps}.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(
                f"`initializer_range` must be a number that is not negative, got {self.initializer_range}."
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be in [0, 1), got {self.attention_dropout}.")
        if self.cache_dtype not in (None, "float8_e4m3fn", "int4"):
            raise ValueError(f"`cache_dtype` must be 'float8_e4m3fn', 'int4' or None, got {self.cache_dtype!r}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        self._validate_rope_parameters()
        if self.rotary_dim < 2 or self.rotary_dim > self.b_dim or self.rotary_dim % 2:
            size = "`head_dim`" if self.c_factor_dim is None else "`head_dim` / `c_factor_dim`"
            raise ValueError(
                f"RoPE rotates an even number of features, from 2 to {size}: got int({size} * `partial_rotary_factor`) "
                f"= {self.rotary_dim} with {size} = {self.b_dim}."
            )

    def _validate_window(self, window: int | None):
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"`sliding_window` must be a positive integer or None, got {window!r}.")
        if window is None and {"sliding_attention", "full_attention"} <= set(self.layer_types or ()):
            raise ValueError("`sliding_window` must be a positive integer for `layer_types` of both kinds, got None.")

    def _validate_rope_parameters(self):
        """Refuses what RoPE's functions would fail on, or misread."""
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        rope_types = ("default", *sorted(ROPE_INIT_FUNCTIONS))
        if rope_type not in rope_types:
            raise ValueError(f"`rope_parameters['rope_type']` must be one of {rope_types}, got {rope_type!r}.")
        for name, value in rope.items():
            if isinstance(value, dict):
                raise ValueError(f"`rope_parameters` must be those of all layers, got some for {name!r} alone.")
            is_optional = name in OPTIONAL_ROPE_NUMBERS or name == "factor" and rope_type == "longrope"
            if name in ROPE_NUMBERS and not (_is_positive(value) or is_optional and value in (None, 0)):
                raise ValueError(f"`rope_parameters[{name!r}]` must be a positive number, got {value!r}.")
        for name in ("short_factor", "long_factor"):
            factors, count = rope.get(name), self.rotary_dim // 2
            is_list = isinstance(factors, list) and len(factors) == count and all(map(_is_positive, factors))
            if rope_type == "longrope" and not is_list:
                raise ValueError(
                    f"`rope_parameters[{name!r}]` must be a list of {count} positive numbers, got {factors!r}."
                )

    def validate_rope(self):
        """Part of `@strict`-powered validation, as in every model; what is missing is a wrong value, too."""
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    def _validate_variants(self):
        """Refuses variants of the factors that exclude each other."""
        if self.head_factor_act not in (None, "sigmoid", "softmax"):
            raise ValueError(f"`head_factor_act` must be 'sigmoid', 'softmax' or None, got {self.head_factor_act!r}.")
        if self.c_factor_dim is not None and (self.c_factor_dim < 1 or self.head_dim % self.c_factor_dim):
            raise ValueError(
                f"`c_factor_dim` must be a divisor of `head_dim`={self.head_dim}, or None, got {self.c_factor_dim}."
            )
        if self.qk_norm not in (False, True, "heads"):
            raise ValueError(
                f"`qk_norm` must be False, True (of rows of B_K) or 'heads' (of formed keys), got {self.qk_norm!r}."
            )
        if self.qk_norm == "heads" and self.noncontextual_a:
            raise ValueError(
                "`qk_norm`='heads' and `noncontextual_a` exclude each other: it would make a constant A_K one of the token. "
                "With `qk_norm`=True, rows of B_K are normalised, which is the same where each head has one of them."
            )
        if self.shared_b and any(len(set(self.ranks(i))) > 1 for i in range(self.num_hidden_layers)):
            raise ValueError(
                f"`shared_b` needs `k_rank` and `v_rank` to be equal, got {self.k_rank} and {self.v_rank}."
            )
        for first, second, reason in (
            ("noncontextual_b", "noncontextual_a", "no factor would depend on the token"),
            ("shared_b", "noncontextual_a", "nothing of the values would be left to cache"),
            ("head_factor_act", "noncontextual_a", "it acts on projected A factors"),
            ("c_factor_dim", "noncontextual_b", "its factors are projections of the token"),
            ("c_factor_dim", "qk_norm", "it has no rows of `head_dim` features to normalise"),
        ):
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"`{first}` and `{second}` exclude each other: {reason}.")


def local_share(config: "T6Config | ConfigView", field: str, num_processes: int, argument: str) -> int:
    """
    The number of heads, of the configuration's `field`, that each process has.

    Raises:
        ValueError: if a number of heads is not divisible, naming the field and the `argument` that sets the number of processes.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % num_processes:
            raise ValueError(
                f"Tensor parallelism shares out whole heads: `{name}`={getattr(config, name)} must be a multiple of {argument}, "
                f"got {num_processes}."
            )
    return getattr(config, field) // num_processes


class ConfigView:
    """A view of a `T6Config`, of which subclasses override fields for code of Transformers that reads configurations."""

    def __init__(self, config: T6Config):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_config"], name)

    def get_text_config(self, *args, **kwargs) -> "ConfigView":
        return self


__all__ = ["T6Config"]
