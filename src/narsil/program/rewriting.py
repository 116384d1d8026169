"""What some operations are made of: kernels that do in one call what a few plain operations do.

Receives an operation and its arguments while a model is recorded; produces the plain operations' result, so that those
are written down in its place, or None where it is to stay. What comes of them is held against the artifact by the gate,
as everything is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["REWRITTEN"]

_OF_ROWS_OF_SCORES = (0, 1, 2)  # kinds of mask: (L, L), (B, L), (B, heads, L, L)


def _attended(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(.., L, D), (.., S, D), (.., S, E) -> the vectors (.., L, E) and their weights (.., L, S). ``hidden``: what is
    added to the scores, or truth values of those that count for nothing."""
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf) if hidden.dtype == torch.bool else scores + hidden
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, value), weights


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """aten._scaled_dot_product_flash_attention_for_cpu."""
    if dropout_p:
        return None
    hidden = attn_mask
    if is_causal:
        hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    by = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _attended(query, key, value, hidden, by)[0], None


def _of_heads(source: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """(B, L, E) -> (B, heads, L, D)."""
    made = functional.linear(source, weight, bias)
    return made.reshape(made.shape[0], made.shape[1], heads, -1).transpose(1, 2)


def _heads_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """aten._native_multi_head_attention."""
    if mask is not None:
        if mask_type not in _OF_ROWS_OF_SCORES:
            return None
        mask = mask.to(torch.bool)
        mask = mask[:, None, None, :] if mask_type == 1 else mask
    each = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    one, two, three = (_of_heads(source, weight, bias, num_head) for source, weight, bias in each)
    made, weights = _attended(one, two, three, mask, 1 / math.sqrt(embed_dim // num_head))
    out = functional.linear(made.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _encoded(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    """aten._transformer_encoder_layer_fwd."""

    def attended(x: Tensor) -> Any:
        heads = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias)
        return _heads_of(x, x, x, *heads, mask, False, True, mask_type)

    def normal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), weight, bias, eps)

    def wide(x: Tensor) -> Tensor:
        inner = functional.linear(x, ffn_weight_1, ffn_bias_1)
        inner = functional.gelu(inner) if use_gelu else functional.relu(inner)
        return functional.linear(inner, ffn_weight_2, ffn_bias_2)

    found = attended(normal(src, norm_weight_1, norm_bias_1) if norm_first else src)
    if found is None:
        return None
    x = src + found[0]
    if norm_first:
        return x + wide(normal(x, norm_weight_2, norm_bias_2))
    x = normal(x, norm_weight_1, norm_bias_1)
    return normal(x + wide(x), norm_weight_2, norm_bias_2)


def _in_groups(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    channels: int,
    inner: int,
    groups: int,
    eps: Any,
) -> Any:
    """aten.native_group_norm."""
    grouped = source.reshape(source.shape[0], groups, -1)
    made = functional.layer_norm(grouped, (grouped.shape[2],), None, None, eps).reshape(source.shape)
    across = (1, channels, *(1,) * (source.dim() - 2))
    made = made if weight is None else made * weight.reshape(across)
    return (made if bias is None else made + bias.reshape(across)), None, None


_LSTM = 2  # mode


def _remembered(
    source: Tensor,
    weight0: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    hx_: Tensor,
    cx_: Tensor,
    reverse: bool,
    batch_sizes: Any,
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    train: bool,
) -> Any:
    """aten.mkldnn_rnn_layer: one layer of an LSTM over (L, B, I), in one direction."""
    if mode != _LSTM or len(batch_sizes) or train:
        return None
    hidden, cell = (part.reshape(source.shape[1], hidden_size) for part in (hx_, cx_))
    made = []
    places = range(source.shape[0])
    for place in reversed(places) if reverse else places:
        gates = functional.linear(source[place], weight0, weight2) + functional.linear(hidden, weight1, weight3)
        taken, kept, new, given = gates.chunk(4, 1)
        cell = torch.sigmoid(kept) * cell + torch.sigmoid(taken) * torch.tanh(new)
        hidden = torch.sigmoid(given) * torch.tanh(cell)
        made.append(hidden)
    output = torch.stack(made[::-1] if reverse else made)
    return output, hidden.reshape(hx_.shape), cell.reshape(cx_.shape), None


REWRITTEN: dict[str, Callable[..., Any]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._native_multi_head_attention": _heads_of,
    "aten._transformer_encoder_layer_fwd": _encoded,
    "aten.native_group_norm": _in_groups,
    "aten.mkldnn_rnn_layer": _remembered,
}
