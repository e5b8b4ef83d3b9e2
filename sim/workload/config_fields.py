"""What sizes in a config.json cannot be: every problem at once, before transformers builds a model from it.

transformers checks types and few values: a negative number of layers makes a model without any, a size of zero an
error deep inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

_LAYERS = (
    "n_layer", "n_layers", "num_layers", "num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
_HEADS = (
    "n_head", "n_heads", "num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads",
    "decoder_attention_heads",
)  # fmt: skip
_WIDTHS = (
    "n_embd", "n_inner", "hidden_size", "d_model", "d_ff", "d_kv", "dim", "hidden_dim", "ffn_dim", "encoder_ffn_dim",
    "decoder_ffn_dim", "intermediate_size", "head_dim", "word_embed_proj_dim", "embedding_size", "image_size",
    "patch_size", "num_channels", "type_vocab_size", "sliding_window", "num_experts", "num_local_experts",
    "moe_intermediate_size",
)  # fmt: skip
_LENGTHS = ("vocab_size", "n_positions", "n_ctx", "max_position_embeddings", "max_target_positions")
# Far beyond any model there is: a slip of the keyboard, which would be built for hours or overflow.
MOST = (
    dict.fromkeys(_LAYERS, 1 << 12)
    | dict.fromkeys(_HEADS, 1 << 14)
    | dict.fromkeys(_WIDTHS, 1 << 20)
    | dict.fromkeys(_LENGTHS, 1 << 30)
)
MAY_BE_ZERO = ("type_vocab_size",)


def problems_of(fields: Mapping[str, Any]) -> Iterator[str]:
    """Each field that cannot be, with its value and what is expected; None is a default of transformers'."""
    for name, value in fields.items():
        if name in MOST and value is not None:
            yield from _size_problems(name, value)
        elif ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            yield f"{name} {value}: must be between 0 and 1"
    heads, shared = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if _is_whole(heads) and _is_whole(shared) and shared > 0 and heads % shared:
        yield f"num_key_value_heads {shared}: must divide num_attention_heads {heads}"


def _size_problems(name: str, value: Any) -> Iterator[str]:
    for part in value if isinstance(value, list) and name in ("image_size", "patch_size") else [value]:
        least = 0 if name in MAY_BE_ZERO else 1
        if not _is_whole(part):
            yield f"{name} {part!r}: a whole number is expected"
        elif not least <= part <= MOST[name]:
            yield f"{name} {part}: must be at least {least} and at most {MOST[name]}"


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
