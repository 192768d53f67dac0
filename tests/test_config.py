"""Settings: overrides, refusals with the nearest key, and every YAML and JSON that we ship."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mica_ds.config import Source, load_config
from mica_ds.errors import UserError
from mica_ds.settings import save_settings
from mica_ds.upstream import check_zero

from .conftest import ROOT

# A study's own file, which names arms, is not a run's config: its base, the -run.yaml beside it, is.
SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/study").glob("*-run.yaml")])


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # as the README does: the shipped paths are relative


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_is_valid(file: Path) -> None:
    config = load_config(file)
    micro = config.train["per_device_train_batch_size"]
    ranks = 2 if file.stem.startswith(("demonstration", "debian-history")) else 8 if "8b" in file.stem else 16
    assert config.data.global_batch % (micro * ranks) == 0


@pytest.mark.parametrize("file", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_every_shipped_deepspeed_json_is_zero_3_for_deepspeed_itself(file: Path) -> None:
    assert DeepSpeedZeroConfig(**json.loads(file.read_text())["zero_optimization"]).stage == 3


def test_the_shipped_cluster_has_the_gpus_of_a_node_that_the_shipped_settings_expect() -> None:
    facts = 'source slurm/cluster.env; echo "$SBATCH_GPUS_PER_NODE ${CPU_JOB[*]} ${CONTAINER[*]}"'
    said = subprocess.run(["bash", "-euc", facts], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    settings = json.loads((ROOT / "configs/deepspeed/zero3-multinode.json").read_text())
    assert int(said.split()[0]) == settings["zero_optimization"]["zero_hpz_partition_size"]


def test_the_studies_and_the_large_models_are_shipped() -> None:
    names = {file.stem for file in SHIPPED}
    assert names >= {"demonstration", "debian-history-run", "llama-3.1-8b", "llama-3.1-70b", "qwen2.5-72b"}


def test_overrides_replace_the_files_values(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config(), ["adapter.r=2", "adapter.targets=[q_proj, v_proj]", "train.learning_rate=1e-4"])
    assert config.adapter.r == 2
    assert config.adapter.targets == ["q_proj", "v_proj"]
    assert config.train["learning_rate"] == 1e-4


def test_the_resolved_config_reads_back_to_the_same(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(tiny_config(), ["adapter.r=2", "data.corpus=[/data/a, {path: b, weight: 2}]"])
    assert config.data.corpus == [Source(path=Path("/data/a")), Source(path=Path("b"), weight=2)]
    save_settings(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["data"]["corpus"][0] == "/data/a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.xyz=3", "unknown key adapter.xyz; known here: method, subspace, r, alpha, targets"),
        ("adapter.aplha=3", "unknown key adapter.aplha; did you mean adapter.alpha?"),
        ("adaptor.r=3", "unknown key adaptor; did you mean adapter?"),
        ("train.learning_rat=1", "unknown key train.learning_rat; did you mean train.learning_rate?"),
        ("train.output_dir=x", "train.output_dir follows from output_dir; set that instead"),
        ("train.save_total_limit=3", "train.save_total_limit is not supported: set checkpoint.keep instead"),
        ("train.resume_from_checkpoint=x", "train.resume_from_checkpoint is not supported: set resume instead"),
        ("train.label_smoothing_factor=0.1", "train.label_smoothing_factor is not supported: the loss is that of the"),
        ("train.average_tokens_across_devices=false", "is not supported: the loss is always the mean over"),
        ("train.eval_on_start=true", "is not supported: what `evaluate` names is always scored before training"),
        ("train.save_strategy=best", "train.save_strategy=best is not supported: set checkpoint.export=best instead"),
        ("train.use_cache=true", "is not supported: training needs no cache, and with one packed documents see each"),
        ("train.dataloader_num_workers=4", "is not supported: samples are read from mapped memory, which needs no"),
        ("train.fsdp=full_shard", "train.fsdp is not supported: DeepSpeed shards the model"),
        ("train.optim=adafactor", "train.optim is not supported: the JSON of `deepspeed` names the optimizer"),
        ("checkpoint.keep=0", "checkpoint.keep: input should be greater than 0"),
        ("train.learning_rate=fast", "train.learning_rate: input should be a valid number"),
        ("adapter.r=many", "adapter.r: input should be a valid integer"),
        ("adapter.r=0", "adapter.r: input should be greater than 0"),
        ("adapter.method=lore", "adapter.method: input should be 'mica', 'lora' or 'full'"),
        ("data.corpus=[]", "data.corpus: list should have at least 1 item"),
        ("data.corpus=[3]", "data.corpus: input should be a valid dictionary"),
        ("data.corpus=[{path: x, wight: 2}]", "data.corpus: unknown key wight; did you mean weight?"),
        ("data.corpus=[{path: x, weight: 0}]", "data.corpus: input should be greater than 0"),
        ("data.corpus=[{path: x, weight: .inf}]", "data.corpus: input should be a finite number"),
        ("adapter.r", "is not of the form key=value"),
        ("deepspeed=missing.json", "missing.json cannot be read"),
        ("evaluate={every: 3}", "evaluate.every needs evaluate.questions, evaluate.domain or evaluate.retention"),
        ("evaluate.patience=3", "evaluate.patience needs evaluate.questions and evaluate.every"),
        ("checkpoint.export=best", "checkpoint.export=best needs evaluate.questions and evaluate.every"),
        ("evaluate.max_forgetting=1.1", "evaluate.max_forgetting needs evaluate.retention, and evaluate.patience or"),
    ],
)
def test_a_mistake_is_named_with_its_key(tiny_config: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(tiny_config(), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: x}\noutput_dir: y\n")
    with pytest.raises(UserError, match="data is missing"):
        load_config(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "asks for ZeRO stage 2"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": None}},
            "offload_param is no section with keys and values",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, "offload_optimizer is no section"),
        ({"optimizer": "AdamW"}, "optimizer is no section"),
        ({"optimizer": {"type": "Lion"}}, "has no optimizer of type Adam or AdamW"),
        ({"gradient_clipping": 1.0}, 'must have "auto" for gradient_clipping, which follows from the config'),
        ({"optimizer": {"type": "AdamW"}}, 'must have "auto" for optimizer.params.lr'),
        ({"bf16": True}, 'must have "auto" for bf16.enabled'),
        ({"scheduler": {"type": "WarmupLR"}}, "has a scheduler; set train.lr_scheduler_type instead"),
    ],
)
def test_a_deepspeed_json_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
        load_config(tiny_config(deepspeed=str(tmp_path / "deepspeed.json")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offload_parms": {}}, "unknown key zero_optimization.offload_parms"),
        (
            {"stage3_max_live_parameters": "many"},
            "zero_optimization.stage3_max_live_parameters: input should be",
        ),
        ({"offload_param": {"device": "tape"}}, "zero_optimization.offload_param.device: input should be "),
        ({"stage3_param_persistence_threshold": "auto"}, ""),
    ],
)
def test_what_deepspeed_does_not_know_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({**settings, "zero_optimization": settings["zero_optimization"] | change}))
    if message:
        with pytest.raises(UserError, match=f"{file}: {message}"):
            check_zero(file)
    else:
        check_zero(file)


def test_resume_is_a_word_or_a_checkpoint(tiny_config: Callable[..., Path]) -> None:
    assert load_config(tiny_config()).resume == "auto"
    assert load_config(tiny_config(), ["resume=never"]).resume == "never"
    assert load_config(tiny_config(), ["resume=runs/x/checkpoints/step-000004"]).resume == Path(
        "runs/x/checkpoints/step-000004"
    )
