"""Reload a run's exports with plain transformers and peft, and compare their logits with those that training left.

    python launch/reload_adapter.py runs/quickstart

Nothing of mica_ds is imported: this is what the adapter's users do, and those of the merged model where there is one.
Exit code 1 where logits disagree beyond the rounding of the compute dtype, or training has changed nothing.
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
    dtype = getattr(torch, name)
    probe = load_file(run / "probe.safetensors")
    size = probe["logits"].abs().max().item()
    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=dtype)
    change = (logits(base, probe["input_ids"]) - probe["logits"]).abs().max().item() / size
    print(f"reload: training has changed the logits by {change:.1e} of their size")
    all_agree = True
    for export in ("adapter", "model", "merged"):
        if not (run / export).is_dir():
            continue
        if export == "adapter":
            # low_cpu_mem_usage: peft fills the factors from the file instead of decomposing every weight again.
            trained = PeftModel.from_pretrained(base, run / export, low_cpu_mem_usage=True)
            for parameter in trained.parameters():
                parameter.data = parameter.data.to(base.dtype)  # as in training; the buffers of RoPE stay fp32
        else:
            trained = AutoModelForCausalLM.from_pretrained(run / export, dtype=dtype)
        error = (logits(trained, probe["input_ids"]) - probe["logits"]).abs().max().item() / size
        agrees = error <= TOLERANCE[name] < change
        all_agree &= agrees
        verdict = f"{name}: at most {TOLERANCE[name]:.0e}: {'agrees' if agrees else 'DISAGREES'}"
        print(f"reload: logits of {export}/ differ from training's by {error:.1e} of their size; {verdict}")
    return 0 if all_agree else 1


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=input_ids).logits.float()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
