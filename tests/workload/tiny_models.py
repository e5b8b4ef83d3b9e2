"""Tiny models of each family, as folders with a config.json, without dropout unless told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS = 2
IMAGES = ("resnet", "vit")  # families that read images
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 100, "n_positions": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    },
    "opt": {
        "model_type": "opt", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "bert": {
        "model_type": "bert", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS,
        "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
    },
    "resnet": {
        "model_type": "resnet", "num_channels": 3, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1],
        "image_size": 32,
    },
    "vit": {
        "model_type": "vit", "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": 64, "image_size": 32, "patch_size": 8,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip


def model_folder(path: Path, family: str, **changes: Any) -> str:
    """A folder with the config.json of a tiny model."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**TINY[family], **changes}))
    return str(path)
