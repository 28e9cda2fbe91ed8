"""Modules that are another one's with some other children, sharing all the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip import modeling_clip

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def view(module: nn.Module, **children: nn.Module) -> Any:
    """A module that works as this one does, with some other children; all else is shared."""
    other = copy.copy(module)
    other._modules = {**module._modules, **children}
    return other


def kept(blocks: Iterable[tuple[str, nn.Module]]) -> nn.ModuleList:
    """Blocks under the names that they have in the tower, whichever come first."""
    layers = nn.ModuleList()
    for name, block in blocks:
        layers.add_module(name, block)
    return layers


def for_class_token(model: Any, vision: Any) -> Any:
    """A CLIP model whose last block computes the class token alone, all that an embedding needs.

    Any other model, a compiled one, and one whose last block is watched by hooks, as it is.
    """
    known = type(model) in (CLIPVisionModel, CLIPVisionModelWithProjection)
    if not known or torch.compiler.is_compiling():
        return model
    blocks = list(vision.encoder.layers.named_children())
    if not blocks:
        return model
    last: Any = blocks[-1][1]
    parts = (model, vision, vision.encoder, last, getattr(last, "self_attn", last))
    watched = any(getattr(part, hooks) for part in last.modules() for hooks in _HOOKS)
    if watched or not all(map(_is_published, parts)) or any(map(_is_replaced, last.modules())):
        return model
    pruned = view(vision, encoder=_ForClassToken(vision.encoder, blocks))
    return pruned if vision is model else view(model, vision_model=pruned)


def _is_published(part: nn.Module) -> bool:
    return type(part).__module__ == modeling_clip.__name__ and not _is_replaced(part)


def _is_replaced(part: nn.Module) -> bool:
    """Whether a call runs something else than the class's `forward`: a patch, or compiled code."""
    return "forward" in vars(part) or getattr(part, "_compiled_call_impl", None) is not None


class _ForClassToken(nn.Module):
    """Stands for the encoder, and gives the class token of what it would: ``[B, 1, H]``."""

    def __init__(self, encoder: nn.Module, blocks: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.before = view(encoder, layers=kept(blocks[:-1]))
        self.last: Any = blocks[-1][1]

    def forward(self, inputs_embeds: Tensor, **options: Any) -> BaseModelOutput:
        hidden = self.before(inputs_embeds=inputs_embeds, **options)[0]
        attention = self.last.self_attn
        all_tokens, token = self.last.layer_norm1(hidden), hidden[:, :1]
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
        return BaseModelOutput(
            last_hidden_state=token + self.last.mlp(self.last.layer_norm2(token))
        )
