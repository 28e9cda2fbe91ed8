"""Files of tensors: those of the safetensors library, written in pieces and mapped."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pairclip._files import MappedTensors, write_header, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
ALL = {str(dtype): torch.arange(i + 1).to(dtype) for i, dtype in enumerate(DTYPES)}
ALL |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "turned": torch.eye(3)[:2].T}
ALL |= {"odd": torch.ones(3, dtype=torch.bool), "n\xe4me": torch.ones(2, 1).expand(2, 3)}


def write(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    with path.open("wb") as file:
        write_tensors(file, tensors, **options)
    return path


def assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tolist() == tensor.tolist(), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "file", ALL, metadata={"key": '"\\udcff"'})
    assert_same(load_file(path), ALL)
    assert_same(MappedTensors(path), ALL)
    assert MappedTensors(path).metadata == {"key": '"\\udcff"'}
    assert all(t.data_ptr() % t.itemsize == 0 for t in MappedTensors(path).values())


def test_what_the_library_writes_is_mapped(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in ALL.items()}
    save_file(tensors, tmp_path / "file", metadata={"key": "value"})
    found = MappedTensors(tmp_path / "file")
    assert_same(found, tensors)
    assert (len(found), found.metadata) == (len(ALL), {"key": "value"})


def test_elements_that_lie_anywhere_are_read_too(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        layout = {"a": (torch.uint8, [3]), "b": (torch.float64, [2]), "c": (torch.int16, [0])}
        write_header(file, layout)
        file.write(b"\1\2\3" + struct.pack("<2d", 0.5, -7.0))
    expected = {"a": torch.tensor([1, 2, 3]).byte(), "b": torch.tensor([0.5, -7.0]).double()}
    assert_same(MappedTensors(tmp_path / "file"), {**expected, "c": torch.zeros(0).short()})


def test_folders_whose_names_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert_same(MappedTensors(write(folder / "file", ALL)), ALL)


def test_a_kind_of_tensor_that_no_file_holds(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"A tensor of torch.complex128 can't be written"):
        write(tmp_path / "file", {"a": torch.zeros(1, dtype=torch.complex128)})


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no header"),
        (b"\xff" * 20, "has no header"),
        (struct.pack("<Q", 10**12) + b"{}", "has no header"),
        (struct.pack("<Q", 8) + b"[[[[[[[[", "Expecting value"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "recursion"),
        (struct.pack("<Q", 2) + b"[]", "is not one of a safetensors file"),
        (header(a=entry()) + bytes(7), "bytes instead of"),
        (header(a=entry()) + bytes(9), "bytes instead of"),
        (header(a=3), "'a' has no place"),
        (header(a=entry(data_offsets=[0, True])), "'a' has no place"),
        (header(a=entry(data_offsets=[0])), "'a' has no place"),
        (header(a=entry(dtype="F33")) + bytes(8), "'a' is of an unknown kind"),
        (header(a=entry(dtype=["F32"])) + bytes(8), "'a' is of an unknown kind"),
        (header(a=entry(shape=[-1, -2])) + bytes(8), "'a' has no shape"),
        (header(a=entry(shape=2)) + bytes(8), "'a' has no shape"),
        (header(a=entry(shape=[3])) + bytes(8), "'a' is not where it should be"),
        (header(a=entry(data_offsets=[4, 12])) + bytes(12), "'a' is not where it should be"),
        (header(a=entry(), b=entry()) + bytes(8), "'b' is not where it should be"),
        (header(a=entry(), __metadata__={"x": 1}) + bytes(8), "metadata are not texts"),
        (header(a=entry(), __metadata__=[]) + bytes(8), "metadata are not texts"),
    ],
)
def test_whatever_a_file_holds_it_is_whole_or_damaged(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file' is damaged: .*({message})"):
        MappedTensors(tmp_path / "file")


def test_no_flipped_bit_of_a_header_is_an_unnamed_error(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.int64)})
    content = path.read_bytes()
    for place in range(len(content) - 16):
        for bit in (0, 5):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                MappedTensors(path)
            except ValueError as error:
                assert f"'{path}' is damaged: " in str(error)  # noqa: PT017
