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
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

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

    Any other model, a compiled one, and one whose last block is changed or watched by hooks, as it
    is.
    """
    known = type(model) in (CLIPVisionModel, CLIPVisionModelWithProjection)
    if not known or torch.compiler.is_compiling():
        return model
    if any(map(_is_compiled, (model, vision, vision.encoder))):
        return model
    blocks = list(vision.encoder.layers.named_children())
    if not blocks or not _as_published(blocks[-1][1]):
        return model
    pruned = view(vision, encoder=_ForClassToken(vision.encoder, blocks))
    return pruned if vision is model else view(model, vision_model=pruned)


def _as_published(block: Any) -> bool:
    if type(block) is not CLIPEncoderLayer or type(block.self_attn) is not CLIPAttention:
        return False
    return not any(
        "forward" in vars(part)
        or _is_compiled(part)
        or any(getattr(part, hooks) for hooks in _HOOKS)
        for part in block.modules()
    )


def _is_compiled(part: nn.Module) -> bool:
    """By its method `compile`; what `torch.compile` returns has a class of its own."""
    return getattr(part, "_compiled_call_impl", None) is not None


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
