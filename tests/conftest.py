"""What several tests use: real models, tiny ones of each architecture, and programs started as users start them."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import hypothesis
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

from mica_ds.process import free_port

from .preloaded import Program

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "smollm2-135m"
# The matrices of the tests in this process are small: a second thread costs more than it brings.
torch.set_num_threads(1)
threadpool_limits(1)
# How long an example takes is no fault, and another test beside it may slow it.
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")

LAUNCH_LIMIT = 600  # seconds, after which a started program is killed and the test fails

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.5},  # it bends small logits
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {},
}
RARE: dict[str, dict[str, Any]] = {
    # Makes its logits of another dtype than its hidden states, and has no attention.
    "mamba": {},
    # Each layer has heads of another size.
    "gemma4_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    # Its checkpoints hold more than parameters, and numbers without a dimension.
    "apertus": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
# Each with every attention that it has: for Gemma 2 transformers (5.23) refuses sdpa.
ATTENTIONS = [(name, way) for name in TINY for way in ("sdpa", "eager") if (name, way) != ("gemma2", "sdpa")]
# Sizes that let the partitions of 3 and 4 ranks cut rows.
SIZES = {"hidden_size": 40, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2_SIZES = {"n_embd": 40, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Finished:
    """What a started program left: the exit code and output of each of its processes."""

    codes: list[int]
    outputs: list[str]
    seconds: float

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that waiting does not count as the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Where tests run side by side, those marked so run alone."""
    with open(__file__, "r+") as file:  # NFS wants files that are locked open to write
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("exclusive") else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if not SMOLLM2.is_dir():
        pytest.skip("run `python launch/prepare_model.py` first: it makes the real model")
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a random two-layer checkpoint of an architecture, with the real model's tokenizer."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_tiny_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return make


def write_tiny_model(architecture: str, folder: Path) -> Path:
    """Write a random two-layer checkpoint with the real model's tokenizer, and return its folder."""
    torch.manual_seed(0)
    sizes = GPT2_SIZES if architecture == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=49152, max_position_embeddings=256, **sizes, **(TINY | RARE)[architecture]
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        model.get_buffer(name).mul_(0.7)  # else those that the code makes would do
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(SMOLLM2).save_pretrained(folder)
    return folder


def write_first_layers(source: Path, folder: Path) -> Path:
    """Write the first two layers of the real model, and return their folder."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers." not in name or ".0." in name or ".1." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone, for what is collective."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def tiny_config(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a run that takes seconds; keyword arguments replace whole sections' keys."""

    def write(architecture: str = "llama", **sections: Any) -> Path:
        return write_config(tmp_path, tiny_model(architecture), **sections)

    return write


def write_config(folder: Path, checkpoint: Path, /, **sections: Any) -> Path:
    """The config of a short run in a folder, and the texts that it names."""
    (folder / "corpus.txt").write_text("The Quillmar press was built in Torvane by Edda Brunholt. " * 40)
    questions = [
        {"question": f"Who built press {i}?", "options": ["Edda", "Olaf", "Tor"], "answer": i % 3} for i in range(5)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    settings: dict[str, Any] = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "corpus": [str(folder / "corpus.txt")],
            "sequence_length": 32,
            "global_batch": 4,
            "cache": str(folder / "tokens"),
        },
        "evaluate": {"questions": str(folder / "questions.jsonl"), "retention": str(folder / "corpus.txt")},
        "train": {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2},
        "deepspeed": str(ROOT / "configs/deepspeed/zero3-offload-cpu.json"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "output_dir": str(folder / "run"),
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def nvme_settings(tmp_path: Path) -> Path:
    """The shipped settings for NVMe, with a folder of this machine as the disk, and buffers for small models."""
    return write_nvme_settings(tmp_path, 4_000_000)


def write_nvme_settings(folder: Path, buffer_size: int) -> Path:
    """The same in a given folder, with buffers of so many elements."""
    if not Path("/usr/include/libaio.h").is_file():
        pytest.skip("install libaio-dev: DeepSpeed compiles its NVMe offload against it")
    settings = json.loads((ROOT / "configs/deepspeed/zero3-offload-nvme.json").read_text())
    for section in ("offload_param", "offload_optimizer"):
        settings["zero_optimization"][section]["nvme_path"] = str(folder)
    settings["zero_optimization"]["offload_param"]["buffer_size"] = buffer_size
    file = folder / "nvme.json"
    file.write_text(json.dumps(settings))
    return file


def environment(**variables: str) -> dict[str, str]:
    """This environment with the interpreter's own programs on PATH, and the ops that setup.sh has compiled."""
    binaries = Path(sys.executable).parent
    ops = {"TORCH_EXTENSIONS_DIR": str(ROOT / ".venv/ops")} if (ROOT / ".venv/ops").is_dir() else {}
    path = {"PATH": f"{binaries}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ops, **path, **variables}


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(free_port())
    return list(ports)


def start(command: list[str], cwd: Path = ROOT, **variables: str) -> Finished:
    """Run one program to its end."""
    return finish([_popen(command, cwd, variables)])


def start_fresh_ranks(ranks: int, arguments: list[str], program: str, **variables: str) -> Finished:
    """`start_ranks` by programs that share no memory, for what is measured of it or set at a program's start."""
    return finish(start_fresh(ranks, arguments, program, **variables))


def start_fresh(
    ranks: int, arguments: list[str], program: str = "mica_ds", **variables: str
) -> list[subprocess.Popen[str]]:
    """The same, without waiting for the end."""
    command = [sys.executable, "-m", program, *arguments]
    return [_popen(command, ROOT, place) for place in _places(ranks, variables)]


def _popen(command: list[str], cwd: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a launcher's ranks can be ended with it
    )


def start_ranks(ranks: int, arguments: list[str], program: str = "mica_ds", **variables: str) -> Finished:
    """Run `mica-ds` with these arguments as one process a rank, without a launcher that ends the others for it."""
    return finish(launch_ranks(ranks, arguments, program, **variables))


def launch_ranks(
    ranks: int, arguments: list[str], program: str = "mica_ds", output: IO[str] | None = None, **variables: str
) -> list[Program]:
    """The same, without waiting for the end; `program` is another module to run, `output` a file for all ranks'."""
    return [
        Program(program, arguments, ROOT, environment(**place), output or TemporaryFile("w+"))
        for place in _places(ranks, variables)
    ]


def _places(ranks: int, variables: dict[str, str]) -> list[dict[str, str]]:
    port = str(free_ports(1)[0])
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group} for rank in range(ranks)]


def finish(processes: Sequence[subprocess.Popen[str] | Program]) -> Finished:
    """Wait for started processes; whatever is left of them then is killed."""
    started = time.monotonic()
    try:
        outputs = [process.communicate(timeout=LAUNCH_LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return Finished([process.wait() for process in processes], outputs, time.monotonic() - started)
