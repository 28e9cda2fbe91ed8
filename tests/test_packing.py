"""Packing: nested state to JSON and tensors and back, without a difference."""

import json
import math
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from pairclip.checkpoints import Checkpoint, write_checkpoint
from pairclip.checkpoints.packing import pack, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def through_text(value: Any) -> Any:
    """What comes back after the JSON was text."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(value, tensors, "state"))
    return unpack(json.loads(text), tensors)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types and order of keys included; NaN is like NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        kinds = [(t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8)) for t in (a, b)]
        return kinds[0][:2] == kinds[1][:2] and kinds[0][2].equal(kinds[1][2])
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        keys = list(zip(a, b, strict=False))
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and str(a) == str(b))
    return bool(a == b)


@st.composite
def random_tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape, generator=generator) * 50
    if dtype.is_floating_point and values.numel() and draw(st.booleans()):
        values.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, -0.0]))
    tensor = values.to(dtype)
    return tensor.transpose(0, -1) if tensor.ndim > 1 and draw(st.booleans()) else tensor


MARKS = ("__tensor__", "__tuple__", "__items__")
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = (
    st.text(max_size=4)
    | st.integers()
    | st.sampled_from(MARKS)
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.tuples(st.integers(), st.text(max_size=2))
)
NESTED = st.recursive(
    PLAIN | random_tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(MARKS), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(NESTED)
def test_what_is_packed_comes_back(value: Any) -> None:
    assert same(through_text(value), value)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.dictionaries(st.text(max_size=4) | st.sampled_from(MARKS), NESTED, max_size=3))
def test_it_comes_back_from_the_disk_too(tmp_path_factory: Any, state: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("packed")
    folder = write_checkpoint(directory, 1, weights={}, state=state, figure=None, keep=1)
    assert same(Checkpoint(folder, 1, None).state(), state)


def test_strings_that_utf8_lacks_come_back(tmp_path: Path) -> None:
    # A file name on Linux that is no UTF-8, as Python gives it; as a key above a tensor too.
    state = {"\udcff": [torch.ones(1), "\udcff\x00\U0001f600"]}
    folder = write_checkpoint(tmp_path, 1, weights={}, state=state, figure=None, keep=1)
    assert same(Checkpoint(folder, 1, None).state(), state)


def test_the_state_of_an_optimizer_comes_back() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state["state"]) == {0, 1}
    assert same(through_text(state), state)


def test_tensors_that_share_memory_come_back_as_two(tmp_path: Path) -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    state = {"all": rows, "again": rows, "last": rows[1], "turned": rows.T}
    state["wide"] = torch.ones(1).expand(4)
    folder = write_checkpoint(tmp_path, 1, weights={}, state=state, figure=None, keep=1)
    loaded = Checkpoint(folder, 1, None).state()
    assert same(loaded, state)
    loaded["all"].zero_()
    assert same(loaded["again"], state["again"])


def test_what_was_packed_does_not_change_with_what_it_came_from() -> None:
    weight, tensors = torch.zeros(2), {}
    pack({"w": weight}, tensors, "state")
    weight.fill_(1)
    (kept,) = tensors.values()
    assert kept.tolist() == [0, 0]


def test_parameters_come_back_as_plain_tensors() -> None:
    loaded = through_text({"w": torch.nn.Parameter(torch.ones(2))})["w"]
    assert type(loaded) is Tensor
    assert not loaded.requires_grad


def test_kinds_of_mappings_and_tuples_come_back_as_plain_ones() -> None:
    class Pair(NamedTuple):
        a: int
        b: float

    value = OrderedDict([("pair", Pair(1, float("inf"))), ("number", np.float64(0.1))])
    assert same(through_text(value), {"pair": (1, float("inf")), "number": 0.1})


@pytest.mark.parametrize(
    ("value", "where", "kind"),
    [
        ({"callbacks": [{}, {"seen": {1, 2}}]}, r"state\.callbacks\.1\.seen", "set"),
        ({"a": (1, [b"raw"])}, r"state\.a\.1\.0", "bytes"),
        ({"memory": np.zeros(2)}, r"state\.memory", "ndarray"),
        ({"rate": np.float32(0.1)}, r"state\.rate", "float32"),
        ({3: {"x": Fraction(1, 2)}}, r"state\.3\.x", "Fraction"),
        ({"f": len}, r"state\.f", "builtin_function_or_method"),
        ({"keys": {frozenset("ab"): 1}}, r"state\.keys", "frozenset"),
        (object(), "state", "object"),
    ],
)
def test_what_cannot_be_written_is_refused_by_its_path(value: Any, where: str, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"^{where} is of type {kind}, which a checkpoint can't"):
        pack(value, {}, "state")
