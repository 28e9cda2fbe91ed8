"""The last block of CLIP for the class token alone, all that an embedding needs of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoder, CLIPEncoderLayer

from pairclip.towers.views import Stand, swapped

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def shortened(model: Any) -> Any:
    """The model whose last block computes its class token alone; itself where that isn't enough.

    Not where one of the modules around the blocks is patched, watched by hooks or compiled, either.
    """
    if torch.compiler.is_compiling() or not _is_published(model):
        return model
    vision = _vision(model)
    encoder = vision.encoder
    around = (model, vision, encoder, encoder.layers)
    if (
        not len(encoder.layers)
        or not _is_plain(encoder.layers[-1])
        or any(map(_is_changed, around))
    ):
        return model
    path = "" if vision is model else "vision_model"
    return swapped(model, path, {"encoder": _Shortened(encoder, None)})


def is_enough(model: nn.Module, last: nn.Module) -> bool:
    """Whether nothing but the class token of this last block is used, and nobody would notice.

    Not for a model of another kind, a block of another class, one that is patched, watched by
    hooks or compiled.
    """
    return not torch.compiler.is_compiling() and _is_published(model) and _is_plain(last)


def _vision(model: Any) -> Any:
    """The transformer: in transformers 5 the model itself, if that has no projection."""
    return getattr(model, "vision_model", model)


def _is_published(model: nn.Module) -> bool:
    """Whether it is known to take the class token alone of what its encoder gives."""
    if type(model) not in (CLIPVisionModel, CLIPVisionModelWithProjection):
        return False
    vision = _vision(model)
    known = type(vision).__module__ == CLIPEncoder.__module__
    return known and type(getattr(vision, "encoder", None)) is CLIPEncoder


def _is_plain(block: Any) -> bool:
    return (
        type(block) is CLIPEncoderLayer
        and type(block.self_attn) is CLIPAttention
        and not any(map(_is_changed, block.modules()))
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


class _Shortened(Stand):
    """Stands for the encoder, and gives the class token of what it would."""

    def forward(self, inputs_embeds: Tensor, **options: Any) -> BaseModelOutput:
        """Run all blocks but the last, and that one for a token."""
        encoder = self.__dict__["block"]
        before = swapped(encoder, "", {"layers": encoder.layers[:-1]})
        hidden_states = before(inputs_embeds=inputs_embeds, **options)[0]
        token = ClassToken(encoder.layers[-1], None)(hidden_states)
        return BaseModelOutput(last_hidden_state=token)
