"""A run's checkpoint in the formats that others load: a peft adapter, or after full fine-tuning a model folder."""

import json
import shutil
from pathlib import Path

from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mica_ds.checkpoint import read_frozen, read_tensors, trained_files
from mica_ds.config import Config, fixed_settings
from mica_ds.model import DTYPES, load_tokenizer
from mica_ds.shelf import check_origin, put_in_place

_BUFFERS = "buffers.safetensors"


def export_checkpoint(config: Config, checkpoint: Path) -> Path:
    """Export a checkpoint of a run folder, and return the folder it went to. Local, on one rank.

    Whole or absent: it is written under another name first.
    Raises: UserError where the checkpoint was made with another adapter.
    """
    check_origin(checkpoint, fixed_settings(config))
    target = export_folder(config)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if config.adapter.method == "full":
        _write_model(config, checkpoint, partial)
    else:
        _write_adapter(config, checkpoint, partial)
    put_in_place(partial, target)
    return target


def export_folder(config: Config) -> Path:
    """Where a run's export goes. Local."""
    return config.output_dir / ("model" if config.adapter.method == "full" else "adapter")


def _write_adapter(config: Config, checkpoint: Path, folder: Path) -> None:
    """peft's format, fp32, both factors: MiCA's B as it came from the cache, never the model's rounded copy."""
    save_file(read_tensors(checkpoint), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    description = PeftConfig.from_pretrained(str(checkpoint))
    description.inference_mode = True
    description.base_model_name_or_path = str(config.model.path.absolute())
    description.save_pretrained(folder)


def _write_model(config: Config, checkpoint: Path, folder: Path) -> None:
    """transformers' format in the compute dtype, one file in memory at a time."""
    dtype = DTYPES[config.model.dtype]
    index: dict[str, str] = {}
    for file in trained_files(checkpoint):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file.name))
    if buffers := read_frozen(checkpoint):
        save_file(buffers, folder / _BUFFERS, metadata={"format": "pt"})
        index.update(dict.fromkeys(buffers, _BUFFERS))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    description = AutoConfig.from_pretrained(config.model.path, local_files_only=True, trust_remote_code=False)
    description.dtype = dtype
    description.save_pretrained(folder)
    load_tokenizer(config.model).save_pretrained(folder)
