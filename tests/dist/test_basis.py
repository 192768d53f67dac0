"""Bases from a checkpoint's files and from ZeRO-3 partitions, on 1 to 4 ranks, through the command line."""

import functools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mica_ds.basis import Basis

from ..conftest import ROOT, SIZES, finish, launch_ranks, start_ranks
from ..test_solver import assert_is_minor_basis

pytestmark = pytest.mark.dist

PARTITIONED = "tests.dist.partitioned"
ModelMaker = Callable[..., Path]


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "basis" / "manifest.json").read_text())


def bases(run: Path) -> dict[str, torch.Tensor]:
    found = manifest(run)
    stored = Basis(run / "basis", found["r"], found, solved=0, seconds=0.0)
    return {record["name"]: stored[record["name"]] for record in found["matrices"]}


def assert_bases_match(run: Path, weights: dict[str, torch.Tensor], transposed: bool = False) -> None:
    """Every basis in a run folder is the minor basis of the stock weight of its module."""
    found = bases(run)
    assert found
    for name, B_MR in found.items():
        W = weights[f"{name}.weight"]
        assert_is_minor_basis(W.T if transposed else W, B_MR, manifest(run)["r"])


def write_config(folder: Path, checkpoint: Path, **sections: Any) -> Path:
    """A config for bases alone; its output_dir is `folder`/run."""
    (folder / "corpus.txt").write_text("text")
    settings: dict[str, Any] = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "adapter": {"r": 5},
        "data": {"corpus": [str(folder / "corpus.txt")], "global_batch": 12},
        "deepspeed": str(ROOT / "configs/deepspeed/zero3-offload-cpu.json"),
        "output_dir": str(folder / "run"),
        **sections,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def run_bases(ranks: int, config: Path, *overrides: str, program: str = "mica_ds", **environment: str) -> str:
    """Compute the bases of a config, one thread a rank, and return rank 0's output."""
    verb = ["basis"] if program == "mica_ds" else []
    finished = start_ranks(ranks, [*verb, str(config), *overrides], program, OMP_NUM_THREADS="1", **environment)
    assert finished.codes == [0] * ranks, finished.output
    return finished.outputs[0]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Makes a random checkpoint without a tokenizer: bases need none."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(architecture, **{"vocab_size": 96, **SIZES, **sizes})
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def middle(make_model: ModelMaker) -> Path:
    """One layer large enough that its rectangular weights are factored by their Grams, and cut within rows."""
    return make_model(hidden_size=656, intermediate_size=1501, num_hidden_layers=1)


@pytest.fixture(scope="module")
def runs(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], tuple[Path, Path]]:
    """The run folder and config of one run from each source on each number of ranks, made once."""
    made: dict[tuple[int, str], tuple[Path, Path]] = {}

    def make(ranks: int, program: str = "mica_ds") -> tuple[Path, Path]:
        if (ranks, program) not in made:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            config = write_config(folder, tiny_model("llama"))
            run_bases(ranks, config, program=program)
            made[ranks, program] = (folder / "run", config)
        return made[ranks, program]

    return make


@pytest.mark.parametrize("program", ["mica_ds", PARTITIONED])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_bases_are_right_and_the_same_bits_from_any_source_on_any_number_of_ranks(
    ranks: int, program: str, runs: Callable[..., tuple[Path, Path]], tiny_model: Callable[[str], Path]
) -> None:
    run, _ = runs(ranks, program)
    reference, _ = runs(1)
    assert_bases_match(run, load_file(tiny_model("llama") / "model.safetensors"))
    found = manifest(run)
    assert len({record["name"] for record in found["matrices"]}) == len(found["matrices"]) == 14
    assert found["world_size"] == ranks
    assert {record["owner"] for record in found["matrices"]} == set(range(ranks))
    assert found["fingerprint"] == manifest(reference)["fingerprint"]
    for name, B_MR in bases(run).items():
        assert torch.equal(B_MR, bases(reference)[name]), name


def test_training_starts_at_once_from_bases_that_were_computed_beforehand(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(tiny_config())
    assert "14 solved" in start_ranks(1, ["basis", config]).output
    assert (tmp_path / "run" / "spectrum.png").is_file()
    finished = start_ranks(2, ["train", config, "train.max_steps=1"])
    assert finished.codes == [0, 0], finished.output
    assert "14 matrices, r = 4, all from the cache" in finished.outputs[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_partial_grams_give_the_bases_of_whole_weights(ranks: int, middle: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, middle)
    run_bases(ranks, config, "basis.exchange=gram", program=PARTITIONED)
    run_bases(1, config, f"output_dir={tmp_path}/whole")
    weights = load_file(middle / "model.safetensors")
    assert_bases_match(tmp_path / "run", weights)
    routes = {
        record["name"].rpartition(".")[2]: record["exchange"] for record in manifest(tmp_path / "run")["matrices"]
    }
    assert routes["gate_proj"] == routes["up_proj"] == "gram"
    assert routes["down_proj"] == "ship"  # stored short side first
    whole = bases(tmp_path / "whole")
    for name, B_MR in bases(tmp_path / "run").items():
        assert torch.linalg.matrix_norm(B_MR @ B_MR.T - whole[name] @ whole[name].T, ord=2) < 1e-4
    assert manifest(tmp_path / "run")["fingerprint"] == manifest(tmp_path / "whole")["fingerprint"]


@pytest.fixture(scope="module")
def long(make_model: ModelMaker) -> Callable[[str], Path]:
    """Makes a layer of which some weights are so long that their Grams may be shared, for Llama's names or GPT-2's."""

    @functools.cache
    def make(architecture: str) -> Path:
        sizes = {"hidden_size": 656, "num_attention_heads": 4}
        inner = {"n_inner": 7001, "n_layer": 1} if architecture == "gpt2" else {"intermediate_size": 7001}
        return make_model(architecture, torch.bfloat16, **{"num_hidden_layers": 1, **sizes, **inner})

    return make


@pytest.mark.parametrize(
    ("ranks", "program", "architecture", "targets", "helped"),
    [
        (2, PARTITIONED, "llama", ["q_proj", "up_proj"], 1),
        (2, PARTITIONED, "gpt2", ["c_proj"], 1),
        (2, "mica_ds", "gpt2", ["c_fc"], 1),
        (4, "mica_ds", "llama", ["q_proj", "up_proj", "down_proj"], 2),
    ],
)
def test_helpers_sum_a_part_of_a_gram_and_the_bits_are_the_same(
    ranks: int,
    program: str,
    architecture: str,
    targets: list[str],
    helped: int,
    long: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = {"path": str(long(architecture)), "dtype": "bfloat16"}
    config = write_config(tmp_path, long(architecture), model=model, adapter={"r": 5, "targets": targets})
    run_bases(ranks, config, program=program)
    run_bases(1, config, f"output_dir={tmp_path}/alone")
    shared, alone = (manifest(tmp_path / run) for run in ("run", "alone"))
    assert [record["exchange"] for record in shared["matrices"]].count("share") == helped
    assert {record["exchange"] for record in alone["matrices"]} == {"ship"}
    assert (shared["digest"], shared["fingerprint"]) == (alone["digest"], alone["fingerprint"])
    weights = load_file(long(architecture) / "model.safetensors")
    named = {name if name.startswith("model.") else f"transformer.{name}": W for name, W in weights.items()}
    assert_bases_match(tmp_path / "run", {**weights, **named}, transposed=architecture == "gpt2")


@pytest.mark.parametrize(
    ("rank", "place"), [("0", "exchange._receive_whole"), ("0", "symmetric.add_strip"), ("1", "exchange._help")]
)
def test_where_an_owner_or_its_helper_fails_the_other_ends(
    rank: str, place: str, long: Callable[[str], Path], tmp_path: Path
) -> None:
    model = {"path": str(long("llama")), "dtype": "bfloat16"}
    config = write_config(tmp_path, long("llama"), model=model, adapter={"r": 5, "targets": ["up_proj"]})
    arguments = [rank, f"mica_ds.{place}", "raise", "basis", str(config)]
    finished = start_ranks(2, arguments, "tests.dist.faulty", OMP_NUM_THREADS="1")
    assert 0 not in finished.codes
    assert "ZeroDivisionError: division by zero" in finished.outputs[int(rank)]


def test_other_subspaces_take_whole_weights(middle: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, middle, adapter={"r": 5, "subspace": "principal"})
    run_bases(2, config, "basis.exchange=gram", program=PARTITIONED)
    weights = load_file(middle / "model.safetensors")
    for name, B_MR in bases(tmp_path / "run").items():
        U = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)[0][:, :5]
        assert torch.linalg.matrix_norm(B_MR.double() - U @ (U.T @ B_MR.double()), ord=2) < 1e-5


@pytest.mark.parametrize("factor", ["gram32", "gram", "eigh"])
def test_the_factor_can_be_chosen(factor: str, middle: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, middle, basis={"factor": factor})
    long_alone = ["adapter.targets=[up_proj, down_proj]"] if factor == "gram32" else []  # made square weights drown
    run_bases(2, config, *long_alone)
    assert {record["factor"] for record in manifest(tmp_path / "run")["matrices"]} == {factor}
    assert_bases_match(tmp_path / "run", load_file(middle / "model.safetensors"))


def test_partitions_on_nvme(middle: Path, nvme_settings: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, middle, deepspeed=str(nvme_settings))
    run_bases(2, config, program=PARTITIONED)
    assert list(tmp_path.glob("zero_stage_3/**/*.swp")), "nothing was offloaded to the disk"
    run_bases(1, config, f"output_dir={tmp_path}/whole")
    for name, B_MR in bases(tmp_path / "run").items():
        assert torch.equal(B_MR, bases(tmp_path / "whole")[name])


@pytest.mark.exclusive  # it counts the bytes of this machine's loopback
@pytest.mark.parametrize(
    ("exchange", "ranks", "source"),
    [("ship", 4, "partitions"), ("gram", 4, "partitions"), ("share", 2, "partitions"), ("share", 2, "files")],
)
def test_traffic_and_memory_are_those_of_one_owner_a_matrix(
    exchange: str, ranks: int, source: str, make_model: ModelMaker, tmp_path: Path
) -> None:
    """Gathering each matrix on each of four ranks would receive three times the model, and hold all of it."""
    inner = 10240 if exchange == "share" else 7168
    model = make_model(dtype=torch.bfloat16, hidden_size=2560, intermediate_size=inner, num_hidden_layers=1)
    settings: dict[str, Any] = {"model": {"path": str(model), "dtype": "bfloat16"}, "basis": {"exchange": exchange}}
    if exchange == "share":
        target = "up_proj" if source == "partitions" else "down_proj"
        settings |= {"adapter": {"r": 5, "targets": [target]}, "basis": {}}
    run_bases(ranks, write_config(tmp_path, model, **settings), program=PARTITIONED, SOURCE=source)
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    records = manifest(tmp_path / "run")["matrices"]
    entries = [math.prod(record["shape"]) for record in records]
    # A Gram's lower triangle from three ranks, tile by tile, in a ring, with the vectors' round trip and headers.
    by_gram = [1.45 * 3 * 8 * 2560**2 for record in records if record["exchange"] == "gram"]
    shipped = [2 * math.prod(record["shape"]) for record in records if record["exchange"] != "gram"]
    assert exchange in {record["exchange"] for record in records}
    assert bool(by_gram) == (exchange == "gram")
    assert costs["received"] <= 1.1 * sum(shipped) + sum(by_gram)
    shard, one_matrix, one_factor, workspace = 2 * sum(entries) // ranks, 2 * max(entries), 8 * 2560**2, 64 << 20
    print(exchange, [g / 1e6 for g in costs["grown"]], (shard + one_matrix + one_factor + workspace) / 1e6)
    assert max(costs["grown"]) <= shard + one_matrix + one_factor + workspace


def test_a_checkpoint_of_several_files_and_a_tied_head(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    stock = transformers.AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    stock.save_pretrained(model, max_shard_size="30KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    run_bases(3, write_config(tmp_path, model, adapter={"r": 5, "targets": ["lm_head", "up_proj", "q_proj"]}))
    assert_bases_match(tmp_path / "run", {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})


def test_experts_are_matrices_of_their_own_and_cannot_be_attached(
    make_model: ModelMaker, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(
        "gpt_oss", num_local_experts=3, num_key_value_heads=2, head_dim=16, intermediate_size=24, num_hidden_layers=1
    )
    config = write_config(tmp_path, model, adapter={"r": 3, "targets": ["experts.gate_up_proj", "q_proj"]})
    run_bases(2, config)
    weights = load_file(model / "model.safetensors")
    stacked = weights["model.layers.0.mlp.experts.gate_up_proj"]  # stored (experts, in, out)
    experts = {name: B for name, B in bases(tmp_path / "run").items() if "experts" in name}
    assert len(experts) == len(stacked) == 3
    for expert, W in enumerate(stacked):
        assert_is_minor_basis(W.T, experts[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"], 3)
    transformers.AutoTokenizer.from_pretrained(ROOT / "models/smollm2-135m").save_pretrained(model)
    refused = tiny_config(model={"path": str(model)}, adapter={"targets": ["experts.gate_up_proj"]})
    finished = start_ranks(2, ["train", str(refused)])
    assert finished.codes == [2, 2], finished.output
    assert "experts.gate_up_proj are stacked experts" in finished.outputs[0]


def test_embeddings_fewer_rows_than_ranks_and_r_equal_to_k(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(num_key_value_heads=1, head_dim=2, num_hidden_layers=1)  # k_proj is 2 × 40
    config = write_config(
        tmp_path, model, adapter={"r": 2, "targets": ["embed_tokens", "lm_head", "k_proj", "gate_proj"]}
    )
    run_bases(4, config, program=PARTITIONED)
    weights = load_file(model / "model.safetensors")
    found = bases(tmp_path / "run")
    assert_is_minor_basis(weights["model.embed_tokens.weight"].T, found.pop("model.embed_tokens"), 2)
    for name, B_MR in found.items():
        assert_is_minor_basis(weights[f"{name}.weight"], B_MR, 2)
    by_name = {record["name"]: record for record in manifest(tmp_path / "run")["matrices"]}
    assert by_name["model.layers.0.self_attn.k_proj"]["relative_gap"] is None


@pytest.mark.parametrize(
    ("values", "warning"),
    [([0.0], "rank-deficient"), ([0.5] * 6, "with a gap at r so small")],
    ids=["deficient", "gap"],
)
def test_a_user_is_warned_of_weights_whose_basis_means_little(
    values: list[float], warning: str, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model()
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    U, S, V = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)
    S[-len(values) :] = S[0] * 0.01 * torch.tensor(values)
    weights[f"{name}.weight"] = (U * S @ V).float()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    output = run_bases(2, write_config(tmp_path, model))
    assert f"warning: bases: {name}: {warning}" in output
    assert output.count("warning: bases") == 1
    assert_bases_match(tmp_path / "run", weights)


def test_a_second_run_takes_all_from_the_cache_and_says_so(runs: Callable[..., tuple[Path, Path]]) -> None:
    run, config = runs(2)
    before = {file: file.stat().st_mtime_ns for file in (run / "basis").iterdir()}
    assert "14 matrices, r = 5, all from the cache" in run_bases(2, config)
    assert {file: file.stat().st_mtime_ns for file in (run / "basis").iterdir()} == before


def test_ranks_that_see_different_files_agree_on_what_is_missing(runs: Callable[..., tuple[Path, Path]]) -> None:
    _, config = runs(2)
    finished = start_ranks(2, ["1", "mica_ds.basis.read_record", "none", "basis", str(config)], "tests.dist.faulty")
    assert finished.codes == [0, 0], finished.output
    assert "FAULT" in finished.outputs[1]
    assert "14 matrices, r = 5, 1 solved" in finished.outputs[0]


def test_a_larger_basis_serves_every_smaller_r(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model("llama"))
    run_bases(1, config, "adapter.r=8")
    assert "r = 3, all from the cache" in run_bases(2, config, "adapter.r=3")
    assert_bases_match(tmp_path / "run", load_file(tiny_model("llama") / "model.safetensors"))
    run_bases(1, config, "adapter.r=3", f"output_dir={tmp_path}/small")
    for cut, solved in zip(
        manifest(tmp_path / "run")["matrices"], manifest(tmp_path / "small")["matrices"], strict=True
    ):
        assert cut["sigma_minor"] == pytest.approx(solved["sigma_minor"])
        assert cut["relative_gap"] == pytest.approx(solved["relative_gap"], rel=1e-3)
    assert "14 solved" in run_bases(1, config, "adapter.r=9")


def test_a_killed_run_goes_on_where_it_stopped(smollm2: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, smollm2, adapter={"r": 16})
    folder = tmp_path / "run" / "basis"
    ranks = launch_ranks(2, ["basis", str(config)], OMP_NUM_THREADS="1")
    while len(list(folder.glob("*.safetensors"))) < 20:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
    finish(ranks)
    done = len(list(folder.glob("*.safetensors")))
    assert 20 <= done < 210
    assert not (folder / "manifest.json").exists()
    assert f"{210 - done} solved" in run_bases(2, config)
    weights = load_file(smollm2 / "model.safetensors")
    found = bases(tmp_path / "run")
    assert len(found) == 210
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj", "model.layers.15.mlp.gate_proj"):
        assert_is_minor_basis(weights[f"{name}.weight"], found[name], 16)


def test_two_jobs_may_start_on_one_cache_at_once(smollm2: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, smollm2, adapter={"r": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    jobs = [launch_ranks(2, ["basis", str(config), f"adapter.r={r}"], OMP_NUM_THREADS="1") for r in (16, 8)]
    for job in jobs:
        finished = finish(job)
        assert finished.codes == [0, 0], finished.output
    for r in (8, 16):
        assert "all from the cache" in run_bases(1, config, f"adapter.r={r}")
    weights = load_file(smollm2 / "model.safetensors")
    for name, B_MR in list(bases(tmp_path / "run").items())[::8]:
        assert_is_minor_basis(weights[f"{name}.weight"], B_MR, 16)
    assert not list((tmp_path / "run" / "basis").glob("*.partial"))


def test_bases_of_another_base_are_refused(
    runs: Callable[..., tuple[Path, Path]], tiny_model: Callable[[str], Path], tmp_path: Path
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


@pytest.mark.parametrize("damage", ["truncated", "foreign", "changed"])
def test_a_damaged_cache_is_refused_by_name(damage: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model("llama"))
    run_bases(1, config)
    file = tmp_path / "run" / "basis" / "model.layers.0.mlp.up_proj.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"weight": torch.zeros(2)}, file, metadata={"record": "[]"})
    else:
        file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    finished = start_ranks(2, ["train" if damage == "changed" else "basis", str(config)])
    assert finished.codes == [2, 2]
    assert f"{file} is damaged" in finished.output


def test_quantised_weights_are_refused_by_name(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = write_config(tmp_path, tmp_path / "model")
    for verb in ("basis", "train"):
        finished = start_ranks(1, [verb, str(config)])
        assert finished.codes == [2]
        assert f"error: model.path: {tmp_path}/model stores {name} as F8_E4M3: " in finished.output
        assert "quantised weights are not supported" in finished.output


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj"])
def test_nan_in_a_file_is_named_on_all_ranks(name: str, long: Callable[[str], Path], tmp_path: Path) -> None:
    """The latter is a matrix of which a helper sums a part of the Gram, where the NaN lies."""
    (tmp_path / "config.json").write_bytes((long("llama") / "config.json").read_bytes())
    weights = load_file(long("llama") / "model.safetensors")
    weights[f"model.layers.0.{name}.weight"][-1, -1] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = {"path": str(tmp_path), "dtype": "bfloat16"}
    config = write_config(tmp_path, tmp_path, model=model, adapter={"r": 5, "targets": [name.rpartition(".")[2]]})
    finished = start_ranks(2, ["basis", str(config)])
    assert finished.codes == [2, 2], finished.output
    assert f"model.layers.0.{name} holds NaN or Inf" in finished.outputs[0]
    assert not (tmp_path / "run" / "basis" / f"model.layers.0.{name}.safetensors").exists()


def test_files_hold_the_record_of_their_matrix(runs: Callable[..., tuple[Path, Path]]) -> None:
    run, _ = runs(1)
    for record in manifest(run)["matrices"]:
        with safe_open(run / "basis" / f"{record['name']}.safetensors", framework="pt") as stored:
            assert json.loads(stored.metadata()["record"]) == record
