"""Out of memory: what to change, from the sizes at hand."""

import errno
import gc
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from mica_ds import comm
from mica_ds.config import Config, recomputes_activations
from mica_ds.errors import UserError
from mica_ds.model import read_model_config

_GIB = 1 << 30
_activations = 0  # bytes of a micro-batch, once they are counted
_largest = (0, 0)  # the shape of the largest weight that has a basis, once it is known
_REFUSALS = "[Cc]an(no|')t allocate memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc"
_PHASES = {  # the first of these modules on the stack says what the memory was for
    "mica_ds.inference": "evaluating",
    "mica_ds.checkpoint": "writing a checkpoint",
    "transformers.trainer": "training",
    "mica_ds.basis": "computing bases",
    "mica_ds.model": "loading the model",
    "mica_ds.tokens": "tokenising the documents",
    "mica_ds.data": "packing the documents",
}


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Raise a UserError that says what to change where the body runs out of memory. Local."""
    try:
        yield
    except Exception as error:
        if isinstance(error, comm.PeerError) or not _is_out_of_memory(error):
            raise  # what another rank ran out of, that one explains
        modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
        phase = next((phase for module, phase in _PHASES.items() if module in modules), "working")
        found = re.search(r"allocate (\d+) bytes", str(error)) or re.search(r"allocate ([\d.]+ \wiB)", str(error))
        asked = "" if found is None else f" for another {readable(int(found[1])) if found[1].isdigit() else found[1]}"
        where = f"rank {comm.rank()} (host {socket.gethostname()})"
        raise UserError(f"{where} ran out of memory while {phase}{asked}: {_advice(config, phase)}") from None


def note_activations(size: int) -> None:
    """What a micro-batch keeps, in bytes, for what is said where memory runs out. Local."""
    global _activations
    _activations = size


def note_largest(shape: tuple[int, int]) -> None:
    """The shape of the largest weight that is to have a basis, for what is said where memory runs out. Local."""
    global _largest
    _largest = shape


def hint(config: Config, phase: str) -> str:
    """What to do about a rank that was killed in a phase, should it have been for its memory. Local."""
    try:
        advice = _advice(config, phase)
    except (OSError, UserError, AttributeError):
        return ""  # a model that cannot be read is reported where it is loaded
    return f"If the kernel killed it for lack of memory (see dmesg): {advice}."


def trim() -> None:
    """Give back to the system what has been freed, but is kept by Python's cycles and by glibc. Local; some 0.1 s."""
    gc.collect()
    psutil.heap_trim()


def _is_out_of_memory(error: Exception) -> bool:
    """torch (2.13) raises plain RuntimeErrors for the host's memory, pinned memory and cuBLAS's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_refused or re.search(_REFUSALS, str(error)) is not None


def _advice(config: Config, phase: str) -> str:
    text = read_model_config(config.model.path).get_text_config()
    model = sum(file.stat().st_size for file in config.model.path.glob("*.safetensors"))
    share = f"a rank's part of the model is {readable(model / comm.world_size())}"
    offload = "take more ranks, or offload by `deepspeed` (configs/deepspeed/)"
    if phase == "evaluating":
        batch = config.evaluate.batch_tokens
        logits = readable(4 * batch * text.vocab_size)
        return f"evaluate.batch_tokens={batch} has logits of {logits} ({text.vocab_size} a token, fp32); lower it"
    if phase == "training":
        batch, length = config.train.get("per_device_train_batch_size", 1), config.data.sequence_length
        keeps = f" keeps {readable(_activations)} of activations" if _activations else ""
        recompute = "" if recomputes_activations(config) else ", or set train.activation_checkpointing=true"
        return (
            f"train.per_device_train_batch_size={batch} × data.sequence_length={length}{keeps}: "
            f"lower either{recompute}; {share}: {offload}"
        )
    if phase == "computing bases":
        rows, columns = _largest
        whole, factors = readable(4 * rows * columns), readable(16 * min(_largest) ** 2)
        return (
            f"a rank holds one weight and its factors at a time, {whole} (fp32) and up to {factors} for the largest "
            f"({rows} × {columns}): run fewer ranks a node"
            + ("" if config.basis.exchange == "gram" else ", or basis.exchange=gram")
        )
    return f"{share}: {offload}"


def readable(size: float) -> str:
    """Bytes as people say them. Local."""
    return f"{size / _GIB:.2f} GiB" if size >= 0.1 * _GIB else f"{size / (1 << 20):.1f} MiB"
