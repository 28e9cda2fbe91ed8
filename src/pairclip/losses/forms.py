"""The forms that the cost of a pair of different classes may have: one table.

A new form is a file like `linear`, with its `cost` and its sum over all pairs, and a row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from pairclip import _checks
from pairclip.losses import hinge, linear, squared
from pairclip.losses.batch import Batch, Term

Negatives = Literal["linear", "hinge", "squared"]


class Form(NamedTuple):
    """What a pair of different classes costs."""

    # Of each similarity, with the margin.
    cost: Callable[[Tensor, float], Tensor]
    # Sum over the pairs of different classes of a batch, with the margin; its gradient times the
    # weight, a float64 scalar, unless the batch wants none.
    over_all_pairs: Callable[[Batch, float, Tensor], Term]
    has_margin: bool = False


FORMS: dict[str, Form] = {
    "linear": Form(linear.cost, linear.over_all_pairs),
    "hinge": Form(hinge.cost, hinge.over_all_pairs, has_margin=True),
    "squared": Form(squared.cost, squared.over_all_pairs),
}


def check_form(negatives: str, margin: float, positive_margin: float) -> None:
    """Raise unless the form is known and the margins are ones that it takes."""
    _checks.check_choice("negatives", negatives, FORMS)
    _checks.check_number("margin", margin)
    _checks.check_number("positive_margin", positive_margin)
    if not FORMS[negatives].has_margin:
        if margin != 0:
            raise ValueError(
                f"`margin` {margin} would be ignored: only negatives='hinge' has a margin, and "
                f"`negatives` is {negatives!r}."
            )
    elif not (math.isfinite(margin) and -1 <= margin < 1):
        raise ValueError(
            f"`margin` must be in [-1, 1), got {margin}. A margin of 1 never penalises a pair."
        )
    if not -1 < positive_margin <= 1:
        raise ValueError(
            f"`positive_margin` must be in (-1, 1], got {positive_margin}. It is the similarity "
            "from which on a pair of one class costs nothing."
        )


def described(loss: Any) -> str:
    """The settings that a loss has of its form, for `print`."""
    text = f"negatives={loss.negatives!r}, margin={loss.margin}"
    # The default is left out, as it was before there was a choice.
    return text if loss.positive_margin == 1 else f"{text}, positive_margin={loss.positive_margin}"
