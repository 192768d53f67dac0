"""Reload a run's export with plain transformers and peft, and compare its logits with those that training left.

    python launch/reload_adapter.py runs/quickstart

Nothing of mica_ds is imported: this is what the adapter's users do. Exit code 1 where the logits disagree beyond the
rounding of the compute dtype, or the adapter changes nothing.
"""

import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# Rounding errors of the logits, relative to their size: the order of additions differs between the two programs.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def main(run: Path) -> int:
    config = yaml.safe_load((run / "config.yaml").read_text())
    name = config["model"]["dtype"]
    probe = load_file(run / "probe.safetensors")
    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=getattr(torch, name))
    base_logits = logits(base, probe["input_ids"])
    if config["adapter"]["method"] == "full":
        trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=getattr(torch, name))
    else:
        # low_cpu_mem_usage: peft fills the factors from the file instead of decomposing every weight again.
        trained = PeftModel.from_pretrained(base, run / "adapter", low_cpu_mem_usage=True)
        for parameter in trained.parameters():
            parameter.data = parameter.data.to(base.dtype)  # as in training; the buffers of RoPE stay fp32
    reloaded = logits(trained, probe["input_ids"])
    size = probe["logits"].abs().max().item()
    error = (reloaded - probe["logits"]).abs().max().item() / size
    change = (reloaded - base_logits).abs().max().item() / size
    agrees = error <= TOLERANCE[name] < change
    print(
        f"reload: logits differ from training's by {error:.1e} of their size ({name}: at most {TOLERANCE[name]:.0e}), "
        f"and from the base model's by {change:.1e}: {'agrees' if agrees else 'DISAGREES'}"
    )
    return 0 if agrees else 1


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=input_ids).logits.float()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
