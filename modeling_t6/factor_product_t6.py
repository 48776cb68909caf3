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
"""The factor projections of a layer as one matrix product, of their concatenated weights padded to whole tiles"""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn


# The output size is padded to a multiple of this. 68 or 34 outputs in half precision do not end on 16 bytes, and fall to slow
# kernels, in the forward pass and twice in the backward pass. A larger multiple gains nothing.
ROW_MULTIPLE = 8
# Up to this many tokens (one that is decoded, or a few that are verified) the overhead of operators outweighs their work.
MAX_OVERHEAD_BOUND_TOKENS = 8
# Whether `generate()` concatenates the weights once for all its tokens; a benchmark may switch it off.
PACK = True


_UNCHANGED = contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """
    A context without autocast on `device`. Autocast mixes its own dtype and float32, and fails on others: float8, or the
    other half precision.
    """
    if not torch._C._is_any_autocast_enabled() or device.type == "meta":  # which has none
        return _UNCHANGED
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _UNCHANGED


def is_exporting() -> bool:
    """
    `torch.compiler.is_exporting()`, which up to torch 2.11 Dynamo takes to be True in torch.compile, too.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_overhead_bound(hidden_states: torch.Tensor) -> bool:
    """
    Whether `hidden_states` [..., tokens, hidden_size] are so few tokens that the number of operators, not their size, decides
    how long a forward pass takes. False where gradients are wanted.
    """
    num_tokens = hidden_states.shape[-2]
    if torch.is_grad_enabled():
        return False
    if is_exporting():  # one exported program serves all lengths
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(num_tokens <= MAX_OVERHEAD_BOUND_TOKENS)
    return num_tokens <= MAX_OVERHEAD_BOUND_TOKENS


def _are_plain(projections: Collection[nn.Module]) -> bool:
    """Whether the projections are `nn.Linear` without hooks or wrappers, whose weights and biases can be concatenated."""
    if not all(type(projection) is nn.Linear and not is_extended(projection) for projection in projections):
        return False
    weights = [parameter for projection in projections for parameter in (projection.weight, projection.bias)]
    first, biases = weights[0], weights[1::2]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return False
    kind = first.dtype, first.device
    return first.device.type != "meta" and all(
        type(weight) in (nn.Parameter, torch.Tensor) and (weight.dtype, weight.device) == kind
        for weight in weights
        if weight is not None
    )


def _are_like(weight: torch.Tensor, projections: Collection[nn.Module]) -> bool:
    """Whether the projections can be put together in a tensor like `weight`."""
    if not _are_plain(projections):
        return False
    first = next(iter(projections)).weight
    return (first.dtype, first.device) == (weight.dtype, weight.device)


def _are_whole(projections: Collection[nn.Module]) -> bool:
    """Whether weights have their shape outside of a forward pass, too: sharding (FSDP, ZeRO) may leave flat shards or nothing."""
    return all(
        projection.weight.shape == (projection.out_features, projection.in_features) for projection in projections
    )


def is_extended(module: nn.Module) -> bool:
    """Whether a call does more than the class's `forward`: by hooks, or by a `forward` that accelerate or sharding has set."""
    return bool(
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


def _concatenate(parameters: list[torch.Tensor], padding: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """The parameters and `padding` rows of zeros, concatenated; into `out` if its shape, dtype and device fit."""
    if padding:
        parameters = [*parameters, parameters[0].new_zeros(padding, *parameters[0].shape[1:])]
    first, rows = parameters[0], sum(len(parameter) for parameter in parameters)
    if out is not None and (out.shape, out.dtype, out.device) != ((rows, *first.shape[1:]), first.dtype, first.device):
        out = None
    with without_autocast(first.device):
        return torch.cat(parameters, out=out)


class FactorProduct:
    """
    The factor projections of a layer, `nn.Linear` by name, as one product.

    Args:
        other: an earlier product, whose memory is used again where it fits.

    Attributes:
        weight, bias: [rows, hidden_size] and [rows] or `None`, those of the projections concatenated, then zeros.
    """

    def __init__(self, projections: dict[str, nn.Linear], other: "FactorProduct | None" = None):
        linears = list(projections.values())
        sizes = [linear.out_features for linear in linears]
        padding = -sum(sizes) % ROW_MULTIPLE
        self.names, self.sizes, self.bias = list(projections), [*sizes, padding], None
        self.weight = _concatenate([linear.weight for linear in linears], padding, other and other.weight)
        if linears[0].bias is not None:
            self.bias = _concatenate([linear.bias for linear in linears], padding, other and other.bias)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The outputs of all projections concatenated, then zeros: [..., rows]"""
        return nn.functional.linear(hidden_states, self.weight, self.bias)

    def split(self, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of each projection, by its name."""
        return dict(zip(self.names, outputs.split_with_sizes(self.sizes, dim=-1)))


class RowProduct(FactorProduct):
    """
    A [`FactorProduct`] whose outputs are B_Q, the key row and the value row as the cache stores them (before RoPE), and A_Q.
    Packing a row permutes and pads the outputs of the projections. Done once to the rows of their weights, it need not be done
    to each token.

    Attributes:
        sizes: the sizes of B_Q, of a key row, which begins with B_K, of a value row, and of A_Q.
    """

    def __init__(
        self, layer: "FactorProjections", projections: dict[str, nn.Linear], other: FactorProduct | None = None
    ):
        def parts(outputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            """From outputs of the projections [1, tokens, out_features], the four parts [..., tokens, size]."""
            a, b = ({x: make(x, outputs) for x in "qkv"} for make in (layer._head_factors, layer._feature_factors))
            rows = layer.key_layout.pack(a["k"], b["k"]), layer.value_layout.pack(a["v"], b["v"])
            return [b["q"].flatten(2), *rows, a["q"].flatten(2)]

        weights = [x.flatten(0, -2).t() for x in parts({name: x.weight.t()[None] for name, x in projections.items()})]
        self.layouts, self.q_rank, self.bias = (layer.key_layout, layer.value_layout), layer.q_rank, None
        self.sizes = [len(weight) for weight in weights]
        self.weight = _concatenate(weights, 0, other and other.weight)
        if all(projection.bias is not None for projection in projections.values()):
            biases = parts({name: x.bias[None, None] for name, x in projections.items()})
            self.bias = _concatenate([bias.flatten() for bias in biases], 0, other and other.bias)

    def split(self, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = outputs.shape[:-1]
        b_q, *rows, a_q = outputs.flatten(0, -2).split_with_sizes(self.sizes, dim=-1)
        (a_k, b_k), (a_v, b_v) = (layout.unpack(x[None, None]) for layout, x in zip(self.layouts, rows))
        b = {"q": b_q, "k": b_k.flatten(2), "v": b_v.flatten(2)}
        a = {"q": a_q.unflatten(-1, (self.q_rank, -1)), "k": a_k, "v": a_v}
        named = {f"{name}_b_proj": x.view(*tokens, -1) for name, x in b.items()}
        return named | {f"{name}_a_proj": x.transpose(-1, -2).reshape(*tokens, -1) for name, x in a.items()}


class PackedFactors:
    """
    The [`FactorProduct`] that a layer keeps for [`packed_factors`].

    Attributes:
        product: `None` before the first use. Its weights keep their addresses, as CUDA graphs that were captured read them.
        is_valid: whether its weights equal those of the projections, as is certain only inside [`packed_factors`].
    """

    def __init__(self):
        self.product, self.is_valid = None, False

    def __reduce__(self):  # copies of a model start without a product
        return PackedFactors, ()

    @torch.inference_mode(False)  # tensors made in inference mode could not be written to outside it
    @torch.no_grad()
    def fill(self, layer: "FactorProjections") -> None:
        projections = layer._factor_projections()
        with without_autocast(next(iter(projections.values())).weight.device):
            self.product = layer._product_of(projections, self.product)
        self.is_valid = True


class FactorProjections(nn.Module):
    """
    A layer with projections `q_b_proj`, `k_b_proj`, ..., `v_a_proj` of the same hidden states. They remain modules with
    parameters of their own, and are computed as one product where that gives the same: see [`project_factors`].
    """

    def __init__(self):
        super().__init__()
        self.packed = PackedFactors()

    def project_factors(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The outputs [..., out_features] of all factor projections of `hidden_states` [..., hidden_size], by name.

        They are slices of one product, B first, so that B starts on 16 bytes. Projections that do more than multiply by
        their weights (quantised, sharded, offloaded, with adapters or hooks) are called separately. So are those of a few
        tokens without gradients, where concatenating the weights costs more than it saves, outside of [`packed_factors`].
        """
        product = self._product_for(hidden_states)
        if product is None:
            return {name: projection(hidden_states) for name, projection in self._factor_projections().items()}
        return product.split(product(hidden_states))

    def project_together(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The product [..., rows] that [`project_factors`] slices; `None` where projections are called separately."""
        product = self._product_for(hidden_states)
        return None if product is None else product(hidden_states)

    def _product_for(self, hidden_states: torch.Tensor) -> FactorProduct | None:
        if self.packed.is_valid and not torch.is_grad_enabled():
            return self.packed.product
        if is_overhead_bound(hidden_states):
            return None
        projections = self._factor_projections()
        return FactorProduct(projections) if len(projections) > 1 and _are_plain(projections.values()) else None

    def _product_of(self, projections: dict[str, nn.Linear], other: FactorProduct | None) -> FactorProduct:
        """The product that [`packed_factors`] keeps."""
        return FactorProduct(projections, other)

    def _apply(self, *args, **kwargs):
        """As in every module; a product of weights that have moved to another device or dtype is dropped."""
        super()._apply(*args, **kwargs)
        product = self.packed.product
        # Projections may have become others since, as quantisation makes them, which need not have a weight.
        if product is not None and not _are_like(product.weight, self._factor_projections().values()):
            self.packed.product, self.packed.is_valid = None, False
        return self

    def _factor_projections(self) -> dict[str, nn.Module]:
        names = (f"{name}_{factor}_proj" for factor in "bca" for name in "qkv")
        return {name: self._modules[name] for name in names if name in self._modules}


@contextlib.contextmanager
def packed_factors(model: nn.Module) -> Iterator[None]:
    """
    A context in which the factor projections of each layer of `model` are one product for any number of tokens without
    gradients, of copies of their weights that are made on entry. Changes to the weights inside the context go unnoticed; the
    next context sees them. `generate()` runs in one; put your own decoding loop, or the capture and all replays of a CUDA
    graph, in another.

    Layers whose projections are not plain (see `_are_plain`) are left alone. The model keeps the copies, which take as much
    memory as the factor projections.
    """
    packed = []
    try:
        for layer in model.modules() if PACK else ():
            if isinstance(layer, FactorProjections) and not layer.packed.is_valid:  # contexts may be nested
                linears = layer._factor_projections().values()
                if len(linears) > 1 and _are_plain(linears) and _are_whole(linears):
                    packed.append(layer.packed)
                    layer.packed.fill(layer)
        yield
    finally:
        for weights in packed:
            weights.is_valid = False
