"""What a plan says, against sums by hand; and the settings that it proposes, against itself."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mica_ds import capacity, factor
from mica_ds.capacity import nearest_fit, replaced, told
from mica_ds.checks import checkpoint_bytes
from mica_ds.cli import app
from mica_ds.config import Config, load_config
from mica_ds.costs import count_costs
from mica_ds.errors import UserError
from mica_ds.footprint import Batch, count_footprint, micro_batch
from mica_ds.gathered import Gathering, pass_through
from mica_ds.loss import TILE_ON_GPU
from mica_ds.plan import GIB, MIB, Plan, make_plan, skeleton
from mica_ds.zero import Cluster

from .conftest import ROOT

LAYERS, HIDDEN, INNER, VOCABULARY, KEYS = 80, 8192, 28672, 128256, 1024
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
PARAMETERS = (
    2 * VOCABULARY * HIDDEN + HIDDEN + LAYERS * (2 * HIDDEN * (HIDDEN + KEYS) + 3 * HIDDEN * INNER + 2 * HIDDEN)
)
OFFLOADED = f"deepspeed={ROOT}/configs/deepspeed/zero3-offload-cpu.json"
PLAIN = f"deepspeed={ROOT}/configs/deepspeed/zero3.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a model's config.json, and nothing else."""
    folder = tmp_path_factory.mktemp("models") / "Llama-3.1-70B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


def shipped(llama: Path, *overrides: str) -> Config:
    absolute = f"deepspeed={ROOT}/configs/deepspeed/zero3-multinode.json"
    return load_config(ROOT / "configs/llama-3.1-70b.yaml", [f"model.path={llama}", absolute, *overrides])


def gpus(nodes: int, gpu: float = 80, host: float = 1024, nvme: float = 0) -> Cluster:
    return Cluster(nodes, 8, int(gpu * GIB), int(host * GIB), int(nvme * GIB))


def sizes(plan: Plan, stage: str, place: str = "gpu") -> dict[str, int]:
    return {part.name: part.size for part in plan.stages[stage] if part.place == place}


def test_the_shipped_70b_config_takes_what_sums_by_hand_say(llama: Path) -> None:
    config = shipped(llama)
    plan = make_plan(config, gpus(2))
    loss, backward = sizes(plan, "loss"), sizes(plan, "backward")
    assert loss["frozen partitions"] == pytest.approx(2 * PARAMETERS / 16)
    assert loss["second copy (hpZ)"] == pytest.approx(2 * PARAMETERS / 8)
    # Each layer's input is kept, and what comes out of the last.
    assert loss["activations"] == pytest.approx(LAYERS * 4096 * HIDDEN * 2, rel=0.05)
    assert loss["live gathered layers"] == 2 * VOCABULARY * HIDDEN  # the head alone
    assert 12 * TILE_ON_GPU <= loss["logits"] <= 20 * TILE_ON_GPU  # of a tile: three copies in fp32, one in bf16
    layer = 2 * (2 * HIDDEN * (HIDDEN + KEYS) + 3 * HIDDEN * INNER)
    assert layer < backward["live gathered layers"] < 2 * layer
    trained = LAYERS * 2 * 16 * HIDDEN
    assert loss["optimizer"] == pytest.approx(12 * trained / 16)
    costs = count_costs(config, plan)
    assert costs.trained == trained
    assert costs.lora == trained + LAYERS * 16 * (HIDDEN + KEYS)
    assert costs.checkpoint == checkpoint_bytes(config)
    assert costs.folder == 4 * costs.checkpoint + LAYERS * 4 * 16 * (HIDDEN + KEYS) + 4 * costs.lora
    assert costs.reduced == 2 * 2 * trained * 15 / 16
    # Fifteen sixteenths of each matrix come to its owner, and each of 16 owners has five of each kind.
    assert costs.basis_moved == LAYERS * 2 * HIDDEN * (HIDDEN + KEYS) * 15 / 16
    kinds = [(HIDDEN, HIDDEN), (KEYS, HIDDEN)]
    assert costs.basis_seconds == pytest.approx(5 * sum(factor.cost(shape, 16) for shape in kinds))
    # All weights for the forward, a layer's again for its recomputation and backward; twice a step.
    layers = 2 * PARAMETERS - 4 * VOCABULARY * HIDDEN
    assert costs.gathered == pytest.approx(2 * 7 / 8 * (2 * layers + 4 * VOCABULARY * HIDDEN), rel=0.01)
    assert costs.gathered_within_node
    assert not plan.misfits


@pytest.mark.parametrize("ranks", [1, 4])
def test_fewer_ranks_than_the_second_copy_asks_for_share_it(ranks: int, llama: Path) -> None:
    config = shipped(llama, "data.sequence_length=1024")
    plan = make_plan(config, Cluster(1, ranks, 80 * GIB, 1024 * GIB))
    assert sizes(plan, "loss")["second copy (hpZ)"] == pytest.approx(2 * PARAMETERS / ranks)
    assert sizes(plan, "loss")["frozen partitions"] == pytest.approx(2 * PARAMETERS / ranks)
    layers = 2 * PARAMETERS - 4 * VOCABULARY * HIDDEN
    gathered = (ranks - 1) / ranks * (2 * layers + 4 * VOCABULARY * HIDDEN)
    assert count_costs(config, plan).gathered == pytest.approx(32 / ranks * gathered, rel=0.01)


def test_no_rank_needs_more_with_more_ranks(llama: Path) -> None:
    for overrides in ([], [PLAIN], [OFFLOADED]):
        plans = [make_plan(shipped(llama, *overrides), gpus(nodes)) for nodes in (1, 2, 4)]
        for fewer, more in pairwise(plans):
            for stage in fewer.stages:
                for place in ("gpu", "host"):
                    assert more.need(place, stage) <= fewer.need(place, stage), (overrides, stage, place)


def test_each_setting_moves_what_it_should(llama: Path) -> None:
    plain = make_plan(shipped(llama, PLAIN), gpus(1))
    offloaded = make_plan(shipped(llama, OFFLOADED), gpus(1))
    assert sizes(offloaded, "loss", "host")["frozen partitions"] >= sizes(plain, "loss")["frozen partitions"]
    assert "frozen partitions" not in sizes(offloaded, "loss")
    nvme = f"deepspeed={ROOT}/configs/deepspeed/zero3-offload-nvme.json"
    on_disk = make_plan(shipped(llama, nvme), gpus(1, nvme=1000))
    assert sizes(on_disk, "loss", "nvme")["frozen partitions"] == sizes(plain, "loss")["frozen partitions"]
    assert sizes(on_disk, "loss", "host")["NVMe buffers"] == 16 * 160_000_000 * 2
    longer = make_plan(shipped(llama, PLAIN, "data.sequence_length=8192"), gpus(1))
    assert sizes(longer, "loss")["activations"] == pytest.approx(2 * sizes(plain, "loss")["activations"], rel=0.02)
    grown = sizes(longer, "loss")["logits"] - sizes(plain, "loss")["logits"]
    assert grown == pytest.approx(4096 * HIDDEN * 2, rel=0.1)  # a tile stays a tile; the head's input has a gradient
    kept = make_plan(shipped(llama, PLAIN, "model.offload_activations=true"), gpus(1))
    assert sizes(kept, "loss", "host")["activations"] == sizes(plain, "loss")["activations"]


def test_a_layer_that_is_recomputed_keeps_its_input_alone(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config(), ["train.activation_checkpointing=true"])
    model = json.loads((config.model.path / "config.json").read_text())
    found = []
    for layers in (3, 4):
        folder = config.output_dir.parent / str(layers)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**model, "num_hidden_layers": layers, "layer_types": None}))
        settings = config.model.model_copy(update={"path": folder})
        found.append(count_footprint(settings, config.adapter, micro_batch(config)))
    assert found[1].activations - found[0].activations == 2 * 32 * 40 * 4
    assert found[1].logits == found[0].logits
    whole = count_footprint(config.model, config.adapter, Batch(2, 32, has_mask=True, is_recomputed=False))
    assert whole.activations > 5 * found[0].activations / 3


def test_architectures_are_counted_as_they_are(tiny_config: Callable[..., Path]) -> None:
    for architecture in ("qwen3", "gemma", "phi3", "gpt2"):
        config = load_config(tiny_config(architecture))
        plan = make_plan(config, Cluster(1, 2, 0, 8 * GIB))
        assert sizes(plan, "loss", "host")["activations"] > 2 * 32 * 40 * 4 * 2


def test_the_other_methods_have_no_bases(tiny_config: Callable[..., Path]) -> None:
    for method in ("full", "lora"):
        config = load_config(tiny_config(adapter={"method": method}))
        plan, model = make_plan(config, Cluster(1, 2, 0, 8 * GIB)), skeleton(config)[0]
        loss, costs = sizes(plan, "loss", "host"), count_costs(config, plan)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert costs.trained == trained
        assert loss["optimizer"] == 8 * trained / 2  # two moments; fp32 weights are their own masters
        assert costs.checkpoint == 12 * trained
        assert "bases" not in plan.stages
        assert (costs.basis_moved, costs.basis_seconds) == (0, 0)
        if method == "full":
            assert loss["partitions"] == 4 * trained / 2
            assert "adapters" not in loss
        else:
            assert costs.lora == trained


def test_weights_are_gathered_by_deepspeeds_rules(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config())
    model, _, _ = skeleton(config)
    footprint = count_footprint(config.model, config.adapter, micro_batch(config))
    elements = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())

    def live(reuse: int, prefetch: int, **changes: bool) -> tuple[int, int]:
        rules = {"is_sharded": True, "is_copied": True, "by_gloo": False, **changes}
        passage = pass_through(model, footprint, Gathering(10**9, reuse, prefetch, **rules), 4, False, set())
        return passage.loss.gathered, max(passage.forward.gathered, passage.loss.gathered, passage.backward.gathered)

    assert live(10**9, 0)[0] == 4 * elements  # near enough to be used again: all stay
    assert live(0, 0) == (4 * 2 * largest, 4 * 2 * largest)  # a module's own, and the buffer that it comes in
    assert live(0, 10**9)[1] > 4 * elements  # all is fetched ahead
    assert live(10**9, 0, is_copied=False, is_sharded=False) == (0, 0)  # one rank has them whole already


@pytest.mark.parametrize(
    ("gpu", "overrides"),
    [
        (24, []),
        (
            24,
            ["train.activation_checkpointing=false", "train.per_device_train_batch_size=4", "evaluate.retention=null"],
        ),
        (12, [OFFLOADED]),
        (30, [PLAIN, "evaluate.batch_tokens=65536"]),
    ],
)
def test_the_nearest_setting_fits_and_is_needed(gpu: float, overrides: list[str], llama: Path) -> None:
    overrides = ["data.sequence_length=1024", *overrides]  # fewer tiles, so less time
    config, cluster = shipped(llama, *overrides), gpus(1, gpu)
    assert make_plan(config, cluster).misfits
    changes = nearest_fit(config, cluster)
    assert changes
    assert not make_plan(*replaced(config, cluster, changes)).misfits
    pasted = [change for change in told(changes).split() if not change.startswith("--")]
    assert shipped(llama, *overrides, *pasted) == replaced(config, cluster, changes)[0]
    for key in changes:
        others = {other: value for other, value in changes.items() if other != key}
        assert make_plan(*replaced(config, cluster, others)).misfits, key


SMALLEST = ["data.sequence_length=128", "evaluate.batch_tokens=128", "evaluate.questions=null"]


@pytest.mark.parametrize(("rows", "fewer"), [(3, 1), (6, 3), (6, 2)])
def test_micro_batches_become_smaller_by_what_divides_them(rows: int, fewer: int, llama: Path) -> None:
    def of(rows: int) -> Config:
        sized = [f"train.per_device_train_batch_size={rows}", "data.global_batch=48"]
        return shipped(llama, PLAIN, *SMALLEST, "data.sequence_length=1024", "evaluate.retention=null", *sized)

    fitting = make_plan(of(fewer), gpus(1))
    need = fitting.need("gpu", fitting.worst("gpu"))
    changes = nearest_fit(of(rows), gpus(1, need / 0.95 / GIB + 1e-6))
    assert changes == {"train.per_device_train_batch_size": fewer}


@pytest.mark.parametrize(("batch", "changes"), [(48, {"--nodes": 3}), (16, {"--nodes": 4, "data.global_batch": 32})])
def test_nodes_that_do_not_divide_the_batch_come_with_a_larger_one(
    batch: int, changes: dict[str, int], llama: Path
) -> None:
    config = shipped(llama, PLAIN, *SMALLEST, "evaluate.retention=null", f"data.global_batch={batch}")
    larger = replaced(config, Cluster(1, 8, 0, 1 << 60), changes)
    plan = make_plan(*larger)
    host = 8 * plan.need("host", plan.worst("host"))
    assert nearest_fit(config, Cluster(1, 8, 0, host)) == changes


def test_changes_can_be_pasted_into_a_shell() -> None:
    changes = {"deepspeed": Path("/my files/zero3.json"), "train.activation_checkpointing": True, "--nodes": 2}
    assert told(changes) == "'deepspeed=/my files/zero3.json' train.activation_checkpointing=true --nodes=2"


def test_where_nothing_fits_it_says_so(llama: Path) -> None:
    assert nearest_fit(shipped(llama), gpus(1, gpu=2)) is None


def test_what_does_not_fit_is_refused_or_warned_of(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(capacity.comm, "say", said.append)
    monkeypatch.setattr(capacity, "nearest_fit", lambda *_: {"train.per_device_train_batch_size": 1})
    cluster = Cluster(1, 2, 0, GIB)
    refusing, warning = (load_config(tiny_config(), [f"capacity={choice}"]) for choice in ("refuse", "warn"))
    plan = make_plan(refusing, cluster)
    nearest = "the nearest that fits: train.per_device_train_batch_size=1"
    with pytest.raises(UserError, match=f"it does not fit: .*; {nearest}; capacity=warn tries all the same"):
        capacity._complain(refusing, cluster, plan)
    assert said == []
    capacity._complain(warning, cluster, plan)
    assert said[0].startswith("warning: plan: it does not fit: ")
    assert said[0].endswith(nearest)
    monkeypatch.setattr(capacity, "nearest_fit", lambda *_: {"train.activation_checkpointing": True, "--nodes": 2})
    capacity._complain(warning, cluster, plan)
    assert said[1].endswith("the nearest that fits: train.activation_checkpointing=true on 2 nodes")


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_verb_needs_config_json_alone(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    file = tiny_config()
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(load_config(file).model.path / "config.json", folder)
    alone = f"model.path={folder}"
    code, output = run(file, alone, "--gpu-memory", 0, "--gpus-per-node", 2, "--host-memory", 8)
    assert code == 0, output
    for word in ("frozen partitions", "live gathered layers", "adapters", "gradients", "optimizer", "activations"):
        assert word in output
    assert "fits: " in output
    code, output = run(file, alone, "--gpu-memory", 0, "--gpus-per-node", 2, "--host-memory", 1, "--json")
    assert code == 2
    found = json.loads(output)
    assert found["misfits"] == ["host"]
    assert found["cluster"]["ranks_per_node"] == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--nodes", "1"], ["--nodes", "2"], ["--gpu-memory", "40"]])
def test_the_readme_shows_what_it_prints(options: list[str], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # as the README does: the shipped paths are relative
    code, output = run("configs/llama-3.1-70b.yaml", f"model.path={llama}", *options)
    assert code == (0 if "--nodes" in options else 2), output
    lines = [line.rstrip() for line in output.splitlines()]
    shown = "\n".join(lines if "--nodes" in options else lines[-2:])
    assert shown in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes"),
        (["--gpu-memory", "-1"], "--gpu-memory"),
        (["--nodes", "3"], "is not divisible by 24 ranks"),
        (["model.path=nowhere"], "config.json is missing"),
        (["adapter.r=1000"], "adapter.r=1000 exceeds"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str, tiny_config: Callable[..., Path]) -> None:
    code, output = run(tiny_config(data={"global_batch": 16}), *arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


def test_parts_add_up(llama: Path) -> None:
    plan = make_plan(shipped(llama), gpus(2))
    for stage, parts in plan.stages.items():
        assert plan.need("gpu", stage) == sum(part.size for part in parts if part.place == "gpu") > 2 * GIB
        assert plan.need("host", stage) > 640 * MIB
