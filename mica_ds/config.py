"""A run's settings: what each key means, and which do not go together."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mica_ds.errors import UserError
from mica_ds.settings import Section, read_settings
from mica_ds.stores import check_uri
from mica_ds.upstream import check_deepspeed, check_training_arguments
from mica_ds.watchdog import PATIENCE


class ModelSettings(Section):
    path: Path
    """Folder of a transformers checkpoint in safetensors."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype; the masters of what trains are fp32 in either case."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """transformers' attention, by default its own choice for the model; flash attention needs its package and a GPU."""
    offload_activations: bool = False
    """Keep the activations that train.activation_checkpointing saves in the host's memory until they are needed."""


class AdapterSettings(Section):
    method: Literal["mica", "lora", "full"] = "mica"
    """MiCA, LoRA, or full fine-tuning of all parameters."""
    subspace: Literal["minor", "principal", "random"] = "minor"
    """Which left singular vectors MiCA's frozen B holds."""
    r: PositiveInt = 16
    """Rank of the adapter."""
    alpha: PositiveInt = 16
    """The adapter's output is scaled by alpha / r."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the adapted linear modules (`q_proj`, …), or all of them but the output head."""


class BasisSettings(Section):
    exchange: Literal["auto", "ship", "gram"] = "auto"
    """How weights reach the rank that solves them: whole, or as partial Grams; the engine chooses for each.

    Only where it may choose this and the factor does it also let a second rank sum a part of a Gram.
    """
    factor: Literal["auto", "lu", "gram32", "gram", "eigh"] = "auto"
    """What is factored: the square weight, its Gram (in fp32 or in fp64), or the Gram's eigenproblem; the engine
    chooses for each."""
    device: Literal["auto", "cpu"] = "auto"
    """Where whole weights are solved: on the owner's GPU where it has fp64 units and room, or always on its CPU."""


class Source(Section):
    """A path alone stands for a source of weight 1."""

    path: Path
    """A file (.txt, .md, .html, .pdf; .jsonl or .parquet with rows of `text` or `messages`), a dataset saved by
    `save_to_disk`, or a folder of them."""
    weight: float = Field(default=1, gt=0, allow_inf_nan=False)
    """How many times each of its sequences comes in a pass over the data; 0.5 takes a random half of them, once."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> Any:
        fields = serialize(self)
        return fields["path"] if self.weight == 1 else fields


class DataSettings(Section):
    corpus: list[Source] = Field(min_length=1)
    """What the model shall learn: paths, or `{path: …, weight: …}`."""
    replay: list[Source] = Field(default=[])
    """General text, mixed in against forgetting."""
    replay_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Share of the training sequences that comes from `replay`, where there is any."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What to do about a file or row that cannot be read: end with its name, or name it and go on without."""
    cache: Path = Path("runs/tokens")
    """Folder for tokenised documents and base models' scores, on storage that all ranks share, for other runs, too."""
    sequence_length: int = Field(default=1024, ge=8)
    """Tokens of a training sequence."""
    pack: bool = True
    """Whether documents share a sequence, without seeing one another; otherwise each has its own, padded at the end."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share each sequence (DeepSpeed's Ulysses), for sequences too long for the memory of one."""
    global_batch: PositiveInt = 32
    """Sequences a step over all ranks; gradient accumulation is derived from it."""


class EvaluateSettings(Section):
    questions: Path | None = None
    """Jsonl: `question`, `options`, `answer` (an index); or, open, `question`, `answer` (a text or accepted ones)."""
    domain: Path | None = None
    """Held-out text of the documents' own kind, a source as in `data.corpus`, whose perplexity shows learning."""
    retention: Path | None = None
    """Held-out general text, a source as in `data.corpus`, whose perplexity shows forgetting."""
    suites: list[str] = Field(default=[])
    """lm-eval's names of standard suites (hellaswag, truthfulqa_mc1, mmlu, …) that `mica-ds evaluate` runs besides."""
    suites_data: Path | None = None
    """Folder with the suites' data, by the names of their repositories; otherwise they must be in the hub's cache."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0 for none besides those before and after."""
    max_forgetting: PositiveFloat | None = None
    """How many times its value before training the retention of a best checkpoint may be: 1.1 for a tenth more."""
    patience: NonNegativeInt = 0
    """Evaluations in a row that are not better than the best one, after which training stops; 0 to go on to the end."""
    batch_tokens: PositiveInt = 4096
    """Tokens that one rank evaluates at a time; their logits (× vocabulary × 4 bytes) must fit."""


class CheckpointSettings(Section):
    keep: PositiveInt = 2
    """Newest checkpoints to keep; the best one is kept besides: `export` says which, or it has the lowest loss."""
    export: Literal["last", "best"] = "last"
    """What is exported: the last step, or the one that knew most within evaluate.max_forgetting, of those evaluated."""
    max_skipped: PositiveInt = 5
    """Steps in a row with a loss or gradient that is not finite, and so without an update, after which a run ends."""


class TrackingSettings(Section):
    uri: str = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI."""
    experiment: str = "mica_ds"
    """Name of the MLflow experiment."""
    parent: str | None = Field(default=None, pattern="^[0-9A-Za-z_-]+$")
    """Id of the run that this one is a child of, as in a study: MLflow's, or the one in its journal."""
    register_as: str | None = Field(default=None, pattern="^[^/:']+$")
    """Name (without /, : and ') of a model in MLflow's registry, of which the adapter becomes a version."""


class Config(Section):
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    basis: BasisSettings = BasisSettings()
    data: DataSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    train: dict[str, Any] = Field(default={})
    """transformers' `TrainingArguments`, passed through."""
    deepspeed: Path = Path("configs/deepspeed/zero3.json")
    """DeepSpeed's own JSON; ZeRO stage 3."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    output_dir: Path
    """The run folder."""
    resume: Literal["auto", "never"] | Path = "auto"
    """Go on from the run folder's newest good checkpoint if there is one, begin again, or go on from this one."""
    capacity: Literal["refuse", "warn"] = "refuse"
    """What `train` does where its plan says that the run does not fit these machines."""
    patience: float = Field(default=PATIENCE, ge=5, allow_inf_nan=False)
    """Seconds after a rank's last sign of life (stopped, or its host lost) in which the others end; at least 5."""


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a run's settings as `read_settings` does, and check those that depend on others or are passed on. Local.

    Raises: UserError that names the file and the key.
    """
    config = read_settings(Config, path, overrides)
    _check_evaluation(path, config)
    arguments = check_training_arguments(path, config.train)
    check_deepspeed(config.deepspeed)
    check_uri(config.tracking.uri)
    return config.model_copy(update={"train": arguments})


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings under which alone a checkpoint means what it says, by their keys."""
    adapter = config.model_dump(mode="json")["adapter"]
    return {"model.dtype": config.model.dtype, **{f"adapter.{key}": value for key, value in adapter.items()}}


def recomputes_activations(config: Config) -> bool:
    """Whether activations are checkpointed, by transformers' name of it or its former one (renamed in 5)."""
    return bool(config.train.get("activation_checkpointing") or config.train.get("gradient_checkpointing"))


def read_deepspeed(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON as a fresh dict, which transformers fills in (its `auto` values)."""
    return json.loads(config.deepspeed.read_text())


def copy_group(config: Config, ranks: int) -> int:
    """How many of these ranks share a second copy of the weights (hpZ); 0 without any. Local."""
    size = int(read_deepspeed(config)["zero_optimization"].get("zero_hpz_partition_size", 1))
    return min(size, ranks) if size > 1 else 0  # as DeepSpeed has it (0.19.8)


def _check_evaluation(path: Path, config: Config) -> None:
    """Refuse settings that would do nothing without others."""
    scored = config.evaluate
    wanted = {"evaluate.patience": scored.patience, "checkpoint.export=best": config.checkpoint.export == "best"}
    for key, is_set in wanted.items():
        if is_set and not (scored.questions and scored.every):
            raise UserError(f"{path}: {key} needs evaluate.questions and evaluate.every")
    if scored.every and not (scored.questions or scored.domain or scored.retention):
        raise UserError(f"{path}: evaluate.every needs evaluate.questions, evaluate.domain or evaluate.retention")
    if scored.max_forgetting and not (scored.retention and any(wanted.values())):
        raise UserError(
            f"{path}: evaluate.max_forgetting needs evaluate.retention, and evaluate.patience or checkpoint.export=best"
        )
