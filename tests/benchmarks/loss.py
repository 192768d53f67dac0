"""What the training loss and its gradient take: with the logits whole, by tiles of several sizes, and by Liger.

    python tests/benchmarks/loss.py

A frozen output head alone, in the model's final norm and loss: on a GPU Llama-3.1's, 16384 tokens in bfloat16, and
Liger's loss where liger-kernel is installed; on a CPU SmolLM2's, 1024 tokens in float32 on one thread. The fastest of
six and, on a GPU, the most memory that they take beyond the weights and the hidden states.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import GIB, ROOT, console, describe_machine
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_liger_kernel_available

sys.path.append(str(ROOT))
from mica_ds.loss import TILE_ON_CPU, TILE_ON_GPU, tile_loss

IS_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if IS_GPU else ("cpu", torch.float32)
VOCABULARY, WIDTH, ROWS, LENGTH = (128256, 4096, 4, 4096) if IS_GPU else (49152, 576, 4, 256)
TILE = TILE_ON_GPU if IS_GPU else TILE_ON_CPU
ONLY_LOSS = {"fused_linear_cross_entropy": True, "rope": False, "rms_norm": False, "swiglu": False}


def measure(change: Callable[[Any], Any]) -> tuple[float, float, float]:
    """The loss of a changed model, milliseconds, and GiB."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=0, num_attention_heads=8)
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM._from_config(config, dtype=DTYPE).requires_grad_(False).train()
        hidden = torch.randn(ROWS, LENGTH, WIDTH, dtype=DTYPE, requires_grad=True)
        labels = torch.randint(VOCABULARY, (ROWS, LENGTH))
    change(model)
    seconds, taken = [], 0
    for _ in range(6):
        hidden.grad = None
        held = _allocated()
        start = time.perf_counter()
        loss = model(inputs_embeds=hidden, labels=labels, use_cache=False).loss
        loss.backward()
        value = loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
        taken = max(taken, _allocated() - held)
        del loss
    return value, min(seconds) * 1e3, taken / GIB


def _allocated() -> int:
    """Bytes on the GPU at most since the last call."""
    if not IS_GPU:
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def main() -> None:
    torch.set_num_threads(1)
    changes: dict[str, Callable[[Any], Any]] = {"whole": lambda model: None}
    for tile in (TILE // 4, TILE, 2 * TILE, 4 * TILE):
        name = f"{tile / (1 << 20):g}Mi logits a tile" + (", as in training" if tile == TILE else "")
        changes[name] = lambda model, tile=tile: tile_loss(model, tile)
    if IS_GPU and is_liger_kernel_available():
        changes["Liger"] = lambda model: apply_liger_kernel(model, ONLY_LOSS)
    title = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    table = Table("loss", "value", "ms", "of whole", *(["GiB"] if IS_GPU else []), title=title)
    whole = 0.0
    for name, change in changes.items():
        value, milliseconds, gib = measure(change)
        whole = whole or milliseconds
        figures = [f"{value:.6f}", f"{milliseconds:.1f}", f"{milliseconds / whole:.2f} x", f"{gib:.2f}"]
        table.add_row(name, *figures[: len(table.columns) - 1])
    console().print(table)


if __name__ == "__main__":
    main()
