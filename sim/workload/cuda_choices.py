"""What PyTorch does otherwise on a CUDA device than on the CPU, done while the tensors are fake CPU tensors.

* scaled_dot_product_attention takes a GPU's kernel (:mod:`sim.workload.attention`);
* dropout is one fused kernel (aten/src/ATen/native/Dropout.cpp), not a random mask, a division and a product;
* softmax to float32 of a float16 tensor converts inside its kernel (aten/src/ATen/native/SoftMax.cpp);
* autocast has other lists: the CPU's own does the matrix products; those ops that CUDA's runs in float32
  (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE) get float32 inputs here.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sim.workload.attention import attend

HALVES = (torch.float16, torch.bfloat16)
# The part of CUDA autocast's float32 lists that models use; a function and the tensor method of the same name.
_FLOAT32_NAMES = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "cumprod", "cumsum", "prod", "sum", "norm", "logsumexp", "dist", "renorm",
)  # fmt: skip
_FLOAT32_FUNCTIONALS = (
    "softplus", "layer_norm", "group_norm", "rms_norm", "cosine_similarity", "nll_loss", "cross_entropy", "kl_div",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits",
)  # fmt: skip
FLOAT32 = frozenset(
    [getattr(torch, name) for name in _FLOAT32_NAMES if hasattr(torch, name)]
    + [getattr(torch.Tensor, name) for name in _FLOAT32_NAMES if hasattr(torch.Tensor, name)]
    + [getattr(functional, name) for name in _FLOAT32_FUNCTIONALS]
    + [torch.Tensor.__pow__, torch.Tensor.__rpow__]
)
SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)
LOG_SOFTMAX = (functional.log_softmax, torch.log_softmax, torch.Tensor.log_softmax)


class CudaChoices(TorchFunctionMode):
    """Sends torch functions to what a CUDA device runs."""

    def __init__(self) -> None:
        super().__init__()
        self._choices: dict[Any, Callable[..., Any]] = {
            functional.scaled_dot_product_attention: _attention,
            functional.dropout: _dropout,
            torch.dropout: _dropout,
            functional.multi_head_attention_forward: self._within,
        }
        softmax = _converting(torch.ops.aten._softmax, functional.softmax)
        log_softmax = _converting(torch.ops.aten._log_softmax, functional.log_softmax)
        self._choices |= dict.fromkeys(SOFTMAX, softmax) | dict.fromkeys(LOG_SOFTMAX, log_softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        choice = self._choices.get(func)
        if choice is not None:
            return choice(*args, **(kwargs or {}))
        if func in FLOAT32 and _autocasting():
            args, kwargs = _float32(args), {key: _float32(value) for key, value in (kwargs or {}).items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def _within(self, *args: Any, **kwargs: Any) -> Any:
        """A function written in Python, with choices to be made inside: it runs with this mode active, and without
        asking modes for an answer to the whole of it."""
        with unittest.mock.patch.object(functional, "has_torch_function", lambda tensors: False), self:
            return functional.multi_head_attention_forward(*args, **kwargs)


def _autocasting() -> bool:
    return bool(torch.is_autocast_enabled("cpu"))


def _float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALVES else value
    return tuple(_float32(v) for v in value) if isinstance(value, list | tuple) else value


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if _autocasting():
        half = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(half) if t.dtype == torch.float32 else t for t in (query, key, value))
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.float32:
            kwargs["attn_mask"] = mask.to(half)
    return attend(query, key, value, *args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # Outside (0, 1), as in evaluation, there is no kernel to fuse: as on the CPU.
    if not training or inplace or not 0 < p < 1 or not input.numel():
        return functional.dropout(input, p, training, inplace)
    out: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _converting(fused: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A softmax that converts inside its kernel, where CUDA's does; else the plain one."""

    def softmax(
        input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        dtype = torch.float32 if dtype is None and _autocasting() else dtype
        if dtype == torch.float32 and input.dtype == torch.float16 and dim is not None:
            return fused(input, dim, True)
        return plain(input, dim, _stacklevel, dtype)

    return softmax
