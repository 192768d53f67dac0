"""Pieces of a checkpoint's files: nothing is left out or written twice, whatever the tensors and the ranks."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mica_ds import comm, pieces
from mica_ds.errors import UserError

SHAPES = st.lists(
    st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pieces")


@settings(max_examples=50)
@given(tensors=SHAPES, size=st.integers(1, 5000), ranks=st.integers(1, 7))
def test_the_ranks_share_every_byte_once(tensors: list, size: int, ranks: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({str(i): torch.ones(shape, dtype=dtype) for i, (shape, dtype) in enumerate(tensors)}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", size)
        patch.setattr(comm, "world_size", lambda: ranks)
        found = list(pieces.cut(file))
        shared = [piece for rank in range(ranks) for piece in pieces.share(found, rank)]
    assert shared == found  # and so each rank has neighbours
    assert b"".join(pieces.read(folder, piece) for piece in found) == file.read_bytes()
    for piece in found:
        for rows in piece.rows:
            if rows.region is not None:
                row = (rows.region.stop - rows.region.start) // (rows.region.shape[:1] or (1,))[0]
                assert (rows.start - rows.region.start) % row == 0
                assert math.prod(rows.region.shape) > 0
        assert piece.size <= size or len(piece.rows) == 1


def test_a_file_that_has_become_shorter(folder: Path) -> None:
    file = folder / "short.safetensors"
    save_file({"a": torch.ones(10)}, file)
    (piece,) = pieces.cut(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="has become shorter"):
        pieces.read(folder, piece)
