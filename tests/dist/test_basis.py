"""Bases from real ZeRO-3 partitions, on 1 to 4 ranks, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..conftest import start_ranks
from ..test_solver import assert_is_minor_basis

pytestmark = pytest.mark.dist


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "basis" / "manifest.json").read_text())


def assert_bases_match(run: Path, weights: dict[str, torch.Tensor], transposed: bool = False) -> None:
    """Every basis in a run folder is the minor basis of the stock weight of its module."""
    records = manifest(run)["matrices"]
    assert records
    for record in records:
        W = weights[f"{record['name']}.weight"]
        with safe_open(run / "basis" / f"{record['name']}.safetensors", framework="pt") as stored:
            B_MR = stored.get_tensor(record["name"])
        assert_is_minor_basis(W.T if transposed else W, B_MR, record["r"])


@pytest.fixture(scope="module")
def runs(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Path, Path]]:
    """The run folder and config of one basis run a world size, made once."""
    made: dict[int, tuple[Path, Path]] = {}

    def make(ranks: int) -> tuple[Path, Path]:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            (folder / "corpus.txt").write_text("text")
            config = folder / "config.yaml"
            config.write_text(
                f"model: {{path: {tiny_model('llama')}, dtype: float32}}\n"
                f"adapter: {{r: 5}}\ndata: {{corpus: [{folder}/corpus.txt], global_batch: 12}}\n"
                f"deepspeed: configs/deepspeed/zero3-offload-cpu.json\noutput_dir: {folder}/run\n"
            )
            finished = start_ranks(ranks, ["basis", str(config)])
            assert finished.codes == [0] * ranks, finished.output
            made[ranks] = (folder / "run", config)
        return made[ranks]

    return make


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sharded_bases_are_right_on_any_number_of_ranks(
    ranks: int, runs: Callable[[int], tuple[Path, Path]], tiny_model: Callable[[str], Path]
) -> None:
    run, _ = runs(ranks)
    assert_bases_match(run, load_file(tiny_model("llama") / "model.safetensors"))
    found = manifest(run)
    names = [record["name"] for record in found["matrices"]]
    assert len(names) == len(set(names)) == 14
    assert found["world_size"] == ranks
    assert {record["owner"] for record in found["matrices"]} == set(range(ranks))


def test_the_fingerprint_and_the_bits_do_not_depend_on_the_cut(runs: Callable[[int], tuple[Path, Path]]) -> None:
    one, three = runs(1)[0], runs(3)[0]
    assert manifest(one)["fingerprint"] == manifest(three)["fingerprint"]
    for file in (one / "basis").glob("*.safetensors"):
        for name, B_MR in load_file(file).items():
            assert torch.equal(B_MR, load_file(three / "basis" / file.name)[name]), name


def test_a_second_run_takes_all_from_the_cache_and_says_so(runs: Callable[[int], tuple[Path, Path]]) -> None:
    run, config = runs(2)
    before = {file: file.stat().st_mtime_ns for file in (run / "basis").iterdir()}
    finished = start_ranks(2, ["basis", str(config)])
    assert finished.codes == [0, 0], finished.output
    assert "14 matrices, r = 5, all from the cache" in finished.outputs[0]
    assert {file: file.stat().st_mtime_ns for file in (run / "basis").iterdir()} == before


def test_an_interrupted_run_goes_on_where_it_stopped(
    runs: Callable[[int], tuple[Path, Path]], tiny_model: Callable[[str], Path]
) -> None:
    run, config = runs(2)
    (run / "basis" / "manifest.json").unlink()
    (run / "basis" / "model.layers.1.mlp.up_proj.safetensors").unlink()
    finished = start_ranks(2, ["basis", str(config)])
    assert "1 solved" in finished.outputs[0]
    assert_bases_match(run, load_file(tiny_model("llama") / "model.safetensors"))


def test_bases_of_another_base_are_refused(
    runs: Callable[[int], tuple[Path, Path]], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, config = runs(2)
    weights = load_file(tiny_model("llama") / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    finished = start_ranks(2, ["basis", str(config), f"model.path={tmp_path}"])
    assert finished.codes == [2, 2]
    assert "holds bases of another base model (model.layers.1.mlp.up_proj differs)" in finished.output
