"""The last block of CLIP for the class token alone, all that an embedding needs of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from pairclip.towers.anatomy import Anatomy
from pairclip.towers.views import Stand, swapped

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def shortened(model: Any, anatomy: Anatomy) -> Any:
    """The model whose last block stands for its class token alone; itself where that isn't enough.

    Not where one of the modules around the blocks is patched, watched by hooks or compiled, either.
    """
    row, name = model.get_submodule(anatomy.parent)._modules, anatomy.names[-1]
    path = anatomy.parent.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
    if not is_enough(model, row[name]) or any(map(_is_changed, around)):
        return model
    return swapped(model, anatomy.parent, {name: ClassToken(row[name], anatomy.extras)})


def is_enough(model: nn.Module, last: Any) -> bool:
    """Whether nothing but the class token of this last block is used, and nobody would notice.

    Not for a model of another kind, a block of another class, one that is patched, watched by
    hooks or compiled.
    """
    return (
        type(model) in (CLIPVisionModel, CLIPVisionModelWithProjection)
        and type(last) is CLIPEncoderLayer
        and type(last.self_attn) is CLIPAttention
        and not torch.compiler.is_compiling()
        and not any(map(_is_changed, last.modules()))
    )


def _is_changed(part: nn.Module) -> bool:
    """Whether a call does something else, or something more, than the class's `forward`."""
    replaced = "forward" in vars(part) or getattr(part, "_compiled_call_impl", None) is not None
    return replaced or any(getattr(part, hooks) for hooks in _HOOKS)


class ClassToken(Stand):
    """Stands for the last block, and gives the class token of what it would: ``[B, 1, H]``."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Queries of one token, keys and values of all."""
        block = self.__dict__["block"]
        attention = block.self_attn
        all_tokens, token = block.layer_norm1(hidden_states), hidden_states[:, :1]
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection, tokens in [
                (attention.q_proj, all_tokens[:, :1]),
                (attention.k_proj, all_tokens),
                (attention.v_proj, all_tokens),
            ]
        )
        dropout = attention.dropout if attention.training else 0.0
        heads = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=attention.scale
        )
        token = token + attention.out_proj(heads.transpose(1, 2).flatten(2))
        return self.as_the_block(token + block.mlp(block.layer_norm2(token)))
