"""The merged model: base + adapter for plain transformers, whatever the base's files look like and whatever happens."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mica_ds.errors import UserError

from ..conftest import TINY, Finished, finish, launch_ranks, start, start_ranks, write_config, write_tiny_model
from ..forged import forge_checkpoint

pytestmark = pytest.mark.dist

IDS = torch.arange(100, 148)[None]


@dataclass(frozen=True)
class Case:
    """A run folder with a forged checkpoint, and the model that it belongs to."""

    config: Path
    base: Path

    @property
    def run(self) -> Path:
        return self.config.parent / "run"

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    @property
    def said(self) -> str | None:
        return json.loads(self.config.with_suffix(".said").read_text())


def make_case(folder: Path, base: Path, dtype: str = "float32", is_forged: bool = True, **adapter: object) -> Case:
    folder.mkdir(exist_ok=True)
    config = write_config(folder, base, model={"path": str(base), "dtype": dtype}, adapter={"r": 4, "alpha": 8, **adapter})
    if is_forged:
        forge_checkpoint(config)
    return Case(config, base)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
