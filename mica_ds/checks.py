"""What one rank can find out by itself before a run: its machine, files, store and settings.

Each function returns what it found, the same on all ranks of a sound cluster, or raises a UserError. All are local.
"""

import math
import os
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from mica_ds import comm, process
from mica_ds.adapter import lora_parameters, target_modules
from mica_ds.arguments import accumulation_steps, training_arguments
from mica_ds.chat import ChatError, encode_chat
from mica_ds.config import Config, copy_group, read_deepspeed
from mica_ds.documents import PDF, Broken, Document, find_files, read, read_documents, split, stored_bytes, where
from mica_ds.errors import UserError
from mica_ds.links import device
from mica_ds.memory import readable
from mica_ds.model import load_skeleton, load_tokenizer, stored_buffers
from mica_ds.packing import check_packing
from mica_ds.parallelism import check_parallelism
from mica_ds.questions import read_questions
from mica_ds.shards import weight_shape
from mica_ds.stores import check_folder, database_file, without_secrets
from mica_ds.suites import open_suites
from mica_ds.trainer import check_liger
from mica_ds.weights import open_checkpoint, stored_tensor

_GIB = 1 << 30
_FREE = 0.9  # share of a GPU's memory that must be free before anything is loaded
_HOST_FREE = 0.1  # the same of the host's memory
_READ = 32 << 20  # bytes of a source after which the rest is not read
_VISIBLE = 10  # seconds after which a file must be seen by all nodes
_BUFFERS = 4  # for weights, two moments and gradients: so many DeepSpeed (0.19.8) asserts to be free


def machine(config: Config) -> dict[str, str]:
    """Device, driver, memory and compute mode."""
    memory = psutil.virtual_memory()
    host = {"cores": str(process.cores()), "host memory": f"{memory.total / _GIB:.0f} GiB"}
    if memory.available < _HOST_FREE * memory.total:
        raise UserError(f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.0f} GiB of host memory are free")
    if not torch.cuda.is_available():
        return {"device": "CPU", **host}
    if config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device())} has no bfloat16, which model.dtype asks for")
    free, total = torch.cuda.mem_get_info(device())
    if free < _FREE * total:
        raise UserError(f"{free / _GIB:.1f} of {total / _GIB:.0f} GiB of the GPU are free")
    return {
        "device": torch.cuda.get_device_name(device()),
        "memory": f"{total / _GIB:.0f} GiB",
        **_driver(str(torch.cuda.get_device_properties(device()).uuid)),
        "CUDA": str(torch.version.cuda),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        **host,
    }


def _driver(uuid: str) -> dict[str, str]:
    """Driver and compute mode of a GPU, which torch does not tell."""
    command = ["nvidia-smi", "--query-gpu=uuid,driver_version,compute_mode", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"nvidia-smi does not run: {error}") from None
    for line in output.splitlines():
        found, driver, mode = line.split(", ")
        if uuid in found:
            if mode == "Prohibited":
                raise UserError(f"GPU {uuid} has the compute mode {mode}")
            return {"driver": driver, "compute mode": mode}
    return {}  # a part of a GPU (MIG), which it does not list


def compiled_ops(config: Config) -> str:
    """Compile the ops that DeepSpeed will use under these settings, or find them compiled."""
    settings = read_deepspeed(config)
    offload = {
        name: settings["zero_optimization"].get(name, {}).get("device", "none")
        for name in ("offload_optimizer", "offload_param")
    }
    builders: list[Any] = [] if torch.cuda.is_available() else [ShareMemCommBuilder()]
    if not settings["optimizer"].get("params", {}).get("torch_adam"):
        builders.append(FusedAdamBuilder() if offload["offload_optimizer"] == "none" else CPUAdamBuilder())
    if "nvme" in offload.values():
        builders.append(AsyncIOBuilder())
    for builder in builders:
        try:
            process.require_compiler(isinstance(builder, AsyncIOBuilder))
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            lines = str(error).strip().splitlines()
            reason = next((line for line in lines if "error:" in line), lines[0])
            raise UserError(f"{builder.name} cannot be compiled: {reason}") from None
    return ", ".join(builder.name for builder in builders) or "none needed"


def shared_folders(config: Config, token: str) -> str:
    """Write to the run folder and the token cache, and see there what rank 0 has written: a file named by `token`."""
    files = token_files(config, token)
    for key, file in files.items():  # all of rank 0's, before any is waited for
        mine = file if comm.is_main() else file.with_name(f"{file.name}-{comm.rank()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            mine.touch()
            if not comm.is_main():
                mine.unlink()
        except OSError as error:
            raise UserError(f"{key}: {file.parent} cannot be written: {error.strerror}") from None
    deadline = time.monotonic() + _VISIBLE
    for key, file in files.items():
        while not file.exists():
            if time.monotonic() > deadline:
                raise UserError(f"{key}: {file.parent} is not the folder that rank 0 writes to")
            time.sleep(0.1)
    return "; ".join(f"{file.parent.absolute()} is one folder, and writable" for file in files.values())


def token_files(config: Config, token: str) -> dict[str, Path]:
    """What rank 0 writes for the others to see, by the setting that names its folder."""
    return {"output_dir": config.output_dir / f".{token}", "data.cache": config.data.cache / f".{token}"}


def room(config: Config) -> str:
    """Whether the run folder's disk takes the checkpoints: those kept, the best one, and the one being written."""
    folder = config.output_dir.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    number, size, free = config.checkpoint.keep + 2, checkpoint_bytes(config), shutil.disk_usage(existing).free
    needed = f"{number} checkpoints of {readable(size)}"
    if free < number * size:
        raise UserError(f"{readable(free)} free in {existing}, but {needed} need {readable(number * size)}")
    return needed + " have room"


def checkpoint_bytes(config: Config) -> int:
    """The size of a checkpoint: three fp32 numbers a trainable parameter, one a frozen one of B."""
    model = load_skeleton(config.model)
    if config.adapter.method == "full":
        return 12 * sum(parameter.numel() for parameter in model.parameters())
    modules = target_modules(model, config.adapter)
    both = lora_parameters(modules, config.adapter.r)
    if config.adapter.method == "lora":
        return 12 * both
    frozen = sum(config.adapter.r * weight_shape(module)[0] for module in modules.values())
    return 12 * (both - frozen) + 4 * frozen


def model_files(config: Config) -> dict[str, str]:
    """Whether the model's files are whole and hold every parameter and buffer; the weights are not read."""
    tensors, model = open_checkpoint(config.model.path), load_skeleton(config.model)
    for name, parameter in model.named_parameters():
        stored_tensor(name, tensors, model.base_model_prefix, tuple(parameter.shape))
    stored_buffers(model, tensors)
    load_tokenizer(config.model)
    files = {tensor.file for tensor in tensors.values()}
    size = sum(file.stat().st_size for file in files)
    return {"tensors": str(len(tensors)), "files": str(len(files)), "bytes": f"{size:,}"}


def data_files(config: Config) -> dict[str, str]:
    """Whether documents, replay, questions, held-out text and suites are there and can be read; of much text, some."""
    data, scored = config.data, config.evaluate
    found = {f"corpus {i}": _volume(config, source.path, "data.corpus") for i, source in enumerate(data.corpus, 1)}
    found |= {f"replay {i}": _volume(config, source.path, "data.replay") for i, source in enumerate(data.replay, 1)}
    for key, path in {"retention": scored.retention, "domain": scored.domain}.items():
        if path:
            texts = read_documents([path], f"evaluate.{key}")
            found[key] = f"{len(texts)} documents of {sum(map(len, texts)):,} characters"
    if scored.questions:
        found["questions"] = str(len(read_questions(scored.questions)))
    if scored.suites:
        open_suites(scored.suites if comm.is_main() else [], scored.suites_data)  # only rank 0 converts their data
        found["suites"] = ", ".join(scored.suites)
    return found


def tracker(config: Config) -> str:
    """Whether rank 0, which alone sends, reaches the tracking store."""
    uri = config.tracking.uri
    if not comm.is_main():
        return ""
    check_folder(uri)
    database = database_file(uri)
    try:
        if database is None:
            _ask(uri)
        elif database.exists():
            with closing(sqlite3.connect(database, timeout=2)) as opened:
                opened.execute("BEGIN IMMEDIATE")
    except Exception as error:  # whatever MLflow, requests, SQLAlchemy or sqlite3 may raise
        while error.__context__:  # MLflow (3.17) repeats in its message those of three other libraries
            error = error.__context__  # type: ignore[assignment]
        said = next(iter(without_secrets(str(error)).splitlines()), type(error).__name__)
        raise UserError(f"tracking.uri: {uri} cannot be used: {said}") from None
    return f"{uri} answers" if database is None else f"{database} can be written"


def _ask(uri: str) -> None:
    # MLflow (3.17) would try again for minutes.
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    import mlflow  # takes seconds, which the other ranks need not spend

    mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def deepspeed_settings(config: Config) -> str:
    """Whether the settings go with this number of ranks, and with how they lie on the nodes."""
    steps, ranks, rank = accumulation_steps(config, comm.world_size()), comm.world_size(), comm.rank()
    check_parallelism(config)
    check_packing(config)
    check_liger(config)
    zero = read_deepspeed(config)["zero_optimization"]
    group = copy_group(config, ranks)
    first_of_node = rank - int(os.environ["LOCAL_RANK"])
    if group and (ranks % group or rank // group * group < first_of_node):
        raise UserError(f"zero_hpz_partition_size={group} makes groups that reach over nodes, or are not whole")
    for section in ("offload_param", "offload_optimizer"):
        if zero.get(section, {}).get("device") == "nvme":
            _check_nvme(config, section, zero[section])
    training_arguments(config, steps)
    return f"{config.deepspeed.name} goes with {ranks} ranks, gradient accumulation {steps}"


def _check_nvme(config: Config, section: str, settings: dict[str, Any]) -> None:
    if section == "offload_optimizer":
        if settings.get("buffer_count", _BUFFERS) < _BUFFERS:
            raise UserError(f"{section}.buffer_count is below {_BUFFERS}: the optimizer would run out of buffers")
        return
    largest = max(parameter.numel() for parameter in load_skeleton(config.model).parameters())
    slice_, buffer = math.ceil(largest / comm.world_size()), int(settings.get("buffer_size", 1e8))
    if buffer < slice_:
        raise UserError(f"{section}.buffer_size={buffer} is less than the largest partition, {slice_}")


def _volume(config: Config, source: Path, key: str) -> str:
    """The size of a source; a document is refused or counted as broken, as the config says."""
    files = find_files(source, key)
    sizes = list(map(stored_bytes, files))
    documents, broken, budget, has_chat = 0, 0, _READ, False
    for file, size in zip(files, sizes, strict=True):
        parts = split(file)
        for part in parts:
            for document in read(part):
                if isinstance(document, Document) and document.messages is not None and not has_chat:
                    document, has_chat = _rendered(document, config), True
                if not isinstance(document, Broken):
                    documents += bool(document.text.strip())
                elif config.data.broken == "skip":
                    broken += 1
                else:
                    raise UserError(f"{key}: {where(file, document.place)} {document.reason}")
            budget -= size // len(parts) * (PDF if file.suffix.lower() == ".pdf" else 1)
            if budget < 0:
                return f"{len(files)} files of {sum(sizes):,} bytes"
    if not documents:
        raise UserError(f"{key}: {source} holds no text")
    left_out = f", {broken} broken" if broken else ""
    return f"{documents} documents in {len(files)} files of {sum(sizes):,} bytes{left_out}"


def _rendered(chat: Document, config: Config) -> Document | Broken:
    """A chat, or why the tokenizer's template does not take it. Raises: UserError where there is no template."""
    try:
        encode_chat(chat.messages, load_tokenizer(config.model))
    except ChatError as error:
        return Broken(chat.place, str(error))
    return chat
