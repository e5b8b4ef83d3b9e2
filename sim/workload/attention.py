"""The attention kernel a CUDA device would run, chosen while the tensors are fake CPU tensors.

``scaled_dot_product_attention`` picks its backend by device; under fake CPU tensors it would take the CPU's.  Here it
takes the GPU's, by the rules of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (PyTorch 2.13): flash attention
for half precision without a mask and a head size of at most 256, otherwise the memory-efficient kernel.  Autograd and
the meta kernels of these ops are PyTorch's own.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

FLASH_MAX_HEAD_DIM = 256


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by the op that PyTorch launches on a CUDA device."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    head_dim = query.shape[-1]
    if half and attn_mask is None and head_dim <= FLASH_MAX_HEAD_DIM:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa:
        # The memory-efficient kernel knows no grouped heads: PyTorch repeats the keys and values first.
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        attn_mask = _as_bias(attn_mask, query, key)
    log_sumexp = any(t.requires_grad for t in (query, key, value)) and torch.is_grad_enabled()
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, log_sumexp, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    head_dim = query.shape[-1]
    missing = -head_dim % 8  # the flash kernel wants head sizes in multiples of 8
    if missing:
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = (pad(t, (0, missing)) for t in (query, key, value))
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return out[..., :head_dim] if missing else out


def _as_bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A boolean mask becomes an additive one; either is expanded to [batch, heads, queries, keys]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:-1], key.shape[-2])
