"""The merged model: base + adapter for plain transformers, whatever the base's files look like and whatever happens."""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..conftest import TINY, finish, launch_ranks, start, start_ranks, write_config, write_tiny_model
from ..forged import forge_checkpoint

pytestmark = pytest.mark.dist

IDS = torch.arange(100, 148)[None]
# Logits, relative to their size: merged weights are rounded once to the dtype in which they are stored.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
# What vLLM puts LoRA on (its `packed_modules_mapping` taken apart) in vllm/model_executor/models; GPT-2 has none there.
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SERVED = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
}


@dataclass(frozen=True)
class Case:
    """A run folder with a forged checkpoint, and the model that it belongs to."""

    config: Path
    base: Path
    dtype: str

    @property
    def run(self) -> Path:
        return self.config.parent / "run"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    @property
    def said(self) -> str | None:
        return json.loads(self.config.with_suffix(".said").read_text())

    def load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype))


def make_case(folder: Path, base: Path, dtype: str = "float32", **sections: Any) -> Case:
    folder.mkdir(exist_ok=True)
    sections = {"model": {"path": str(base), "dtype": dtype}, **sections}
    config = write_config(folder, base, **sections)
    forge_checkpoint(config)
    return Case(config, base, dtype)


def several_files(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a model in several files."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="100MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def header(file: Path) -> bytes:
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def factors(case: Case, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the scale of a forged adapter, fp64."""
    folder = case.run / "checkpoints" / "step-000001"
    tensors = stored(folder)
    A, B = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    settings = json.loads((folder / "adapter_config.json").read_text())
    return A.double(), B.double(), settings["lora_alpha"] / settings["r"]


def assert_files_are_the_bases(case: Case) -> None:
    """The same files, names, order and dtypes; all that carries no adapter is the same byte for byte."""
    names = {file.name for file in case.base.iterdir()}
    assert names | {"merge.json"} == {file.name for file in case.merged.iterdir()}
    for name in names:
        base, merged = case.base / name, case.merged / name
        if name.endswith(".safetensors"):
            assert header(base) == header(merged)
            assert base.stat().st_size == merged.stat().st_size
        else:
            assert base.read_bytes() == merged.read_bytes()


def assert_weights_are_the_sum(case: Case, every: int = 1) -> None:
    """W + (alpha / r) B A in fp64, rounded once, in every so-manieth matrix; what has no adapter is as it was."""
    base, merged = stored(case.base), stored(case.merged)
    names = [name for name in stored(case.run / "checkpoints/step-000001") if name.endswith(".lora_B.weight")]
    keys = [name.removeprefix("base_model.model.").removesuffix(".lora_B.weight") for name in names]
    assert len(keys) > 4
    for name in base.keys() - {f"{key}.weight" for key in keys}:
        assert merged[name].equal(base[name])
    for key in keys[::every]:
        assert_is_the_sum(case, key, base[f"{key}.weight"], merged[f"{key}.weight"])


def assert_is_the_sum(case: Case, module: str, base: torch.Tensor, merged: torch.Tensor) -> None:
    A, B, scale = factors(case, module)
    delta, size = scale * (B @ A), scale * (B.abs() @ A.abs())
    if module.startswith("transformer."):  # GPT-2 stores (in, out)
        delta, size = delta.T, size.T
    exact = base.double() + delta
    rounding = torch.finfo(merged.dtype).eps / 2 * exact.abs()
    of_the_sum = (len(A) + 2) * 2**-24 * (base.abs() + size)  # in fp32
    assert ((merged.double() - exact).abs() <= rounding + of_the_sum).all()
    assert not merged.equal(base)


def assert_logits_are_the_adapters(case: Case) -> None:
    base = case.load(case.base)
    alone = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, case.adapter, low_cpu_mem_usage=True))
    merged = logits(case.load(case.merged))
    size, tolerance = adapted.abs().max(), TOLERANCE[case.dtype]
    assert (merged - adapted).abs().max() / size < tolerance < (adapted - alone).abs().max() / size / 2


@pytest.fixture(scope="module")
def cases(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """One run of two ranks exports all of these, as an adapter and merged."""
    root = tmp_path_factory.mktemp("merge")
    made = {name: make_case(root / name, write_tiny_model(name, root / f"{name}-base")) for name in TINY}
    real = several_files(smollm2, root / "real-base", torch.bfloat16)
    made["real"] = make_case(root / "real", real, "bfloat16", adapter={"r": 16, "alpha": 32})
    lora = write_tiny_model("llama", root / "lora-base")
    made["lora"] = make_case(root / "lora", lora, adapter={"method": "lora"})
    # Weights in fp32 of which training saw bf16; written with a header of odd length, as old files have.
    made["mixed"] = make_case(root / "mixed", _odd_header(write_tiny_model("llama", root / "mixed-base")), "bfloat16")
    damaged = write_tiny_model("llama", root / "damaged-base")
    made["damaged"] = make_case(root / "damaged", damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][7] += 1e-3  # nothing that carries an adapter
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    full = write_tiny_model("llama", root / "full-base")
    made["full"] = make_case(root / "full", full, adapter={"method": "full"})
    made["tied"] = make_case(root / "tied", full, adapter={"targets": ["embed_tokens", "q_proj"]})
    disk = root / "small" / "run"
    disk.mkdir(parents=True)
    is_mounted = os.system(f"mount -t tmpfs -o size=9m tmpfs {disk} 2>/dev/null") == 0
    if is_mounted:
        made["small"] = make_case(root / "small", full)
    try:
        finished = start_ranks(2, [str(case.config) for case in made.values()], "tests.dist.merging")
        assert finished.codes == [0, 0], finished.output
        yield made
    finally:
        if is_mounted:
            os.system(f"umount {disk}")


def _odd_header(folder: Path) -> Path:
    file = folder / "model.safetensors"
    data, old = file.read_bytes(), header(file)
    text = old[8:].rstrip() + b" " * 3
    text += b" " * (1 - len(text) % 2)
    assert len(text) % 2
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[len(old) :])
    return folder


@pytest.mark.parametrize("name", [*TINY, "lora", "real", "mixed"])
def test_the_merged_model_is_the_base_and_its_adapter(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    assert case.said is None
    assert_files_are_the_bases(case)
    assert_weights_are_the_sum(case, every=23 if name == "real" else 1)
    assert_logits_are_the_adapters(case)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged", "does not hold the weights that"),
        ("full", "adapter.method=full has nothing to merge"),
        ("tied", "adapter.targets: model.embed_tokens shares its weight with another module"),
        ("small", "has room for 0.0"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(name: str, message: str, cases: dict[str, Case]) -> None:
    if name not in cases:
        pytest.skip("only root may mount the small disk that this needs")
    assert message in (cases[name].said or "")
    assert not list(cases[name].run.glob("merged*"))


@pytest.mark.parametrize("is_lean", [True, False])
def test_peft_loads_the_adapter_and_keeps_b_frozen(
    is_lean: bool, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With low_cpu_mem_usage without an SVD; otherwise peft decomposes every weight, and then takes B from the file."""
    case, calls = cases["llama"], []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: calls.append(1) or svd(*args, **options))
    base = case.load(case.base)
    model = PeftModel.from_pretrained(base, case.adapter, is_trainable=True, low_cpu_mem_usage=is_lean)
    assert len(calls) == (0 if is_lean else 14)
    parameters = dict(model.named_parameters())
    saved = load_file(case.adapter / "adapter_model.safetensors")
    assert len(saved) == 28
    for name, tensor in saved.items():
        parameter = parameters[name.replace(".weight", ".default.weight")]
        assert parameter.equal(tensor)
        assert parameter.requires_grad == ("lora_A" in name)
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == {
        name.replace(".weight", ".default.weight") for name in saved if "lora_A" in name
    }


def served(folder: Path, shapes: dict[str, torch.Size], modules: set[str], max_lora_rank: int) -> float:
    """The scale with which vLLM would serve an adapter. Raises: ValueError for what it would refuse, or get wrong.

    Its rules as of vllm/lora/peft_helper.py (e745bafffc44), lora_model.py (0306474e9d1f) and utils.py (0fd157078c53).
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    r, alpha = settings["r"], settings["lora_alpha"]
    assert isinstance(settings["target_modules"], list)  # required, though the names in the file decide
    if settings.get("modules_to_save") or settings.get("use_dora") or settings.get("bias", "none") != "none":
        raise ValueError("modules_to_save, DoRA and biases are refused")
    if settings.get("rank_pattern") or settings.get("alpha_pattern") or settings.get("use_rslora"):
        raise ValueError("patterns are not looked at, and would be served with one scale")
    if r > max_lora_rank:
        raise ValueError(f"r = {r} exceeds --max-lora-rank")
    prefix = "base_model.model."
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, kind = name.removeprefix(prefix).removesuffix(".weight").rpartition(".")
        if not (name.startswith(prefix) and name.endswith(".weight") and kind in ("lora_A", "lora_B")):
            raise ValueError(f"{name} is no name of a LoRA weight")
        if module.rpartition(".")[2] not in modules:
            raise ValueError(f"{module} takes no LoRA")
        out, width = shapes[f"{module}.weight"]
        if tuple(tensor.shape) != ((r, width) if kind == "lora_A" else (out, r)):
            raise ValueError(f"{name} has another shape than its layer")
    return alpha / r


@pytest.mark.parametrize("name", SERVED)
def test_vllm_would_take_the_adapter(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases[name]
    shapes = {key: tensor.shape for key, tensor in stored(case.base).items()}
    assert served(case.adapter, shapes, SERVED[name], 16) == 2
    assert json.loads((case.adapter / "adapter_config.json").read_text())["init_lora_weights"] == "mica"
    for change, rank, message in (
        ({"modules_to_save": ["lm_head"]}, 16, "refused"),
        ({"alpha_pattern": {"q_proj": 3}}, 16, "one scale"),
        ({}, 2, "exceeds"),
    ):
        other = Path(shutil.copytree(case.adapter, tmp_path / message))
        settings = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            served(other, shapes, SERVED[name], rank)
    with pytest.raises(ValueError, match="takes no LoRA"):
        served(case.adapter, shapes, SERVED[name] - {"o_proj"}, 16)


def plain_adapter(case: Case) -> Path:
    """The forged checkpoint as an adapter, without our export."""
    folder = case.run / "checkpoints" / "step-000001"
    tensors = load_file(folder / "model-00001.safetensors") | load_file(folder / "frozen.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


# A user's own program, with none of ours at hand.
PLAIN = """
import sys
sys.modules["mica_ds"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert AutoTokenizer.from_pretrained(sys.argv[1])("chiller")["input_ids"]
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(100, 148)[None]).logits}, sys.argv[2])
"""


def test_a_killed_export_goes_on(smollm2: Path, tmp_path: Path) -> None:
    """The real model in fp32, one file: killed at work, continued on two ranks, loaded by a program without mica_ds."""
    case = make_case(tmp_path / "case", smollm2, adapter={"r": 16, "alpha": 32})
    command = ["export", str(case.config), "--format", "merged"]
    notes = case.run / "merged.partial" / "notes-0.jsonl"
    (killed,) = launch_ranks(1, command)
    while (not notes.exists() or notes.read_text().count("\n") < 4) and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert finish([killed]).codes == [-signal.SIGKILL]
    assert not case.merged.exists()
    done = notes.read_text().count("\n")
    with (case.run / "merged.partial" / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 8)  # in the first piece: as if it had never reached the disk
    finished = start_ranks(2, command)
    assert finished.codes == [0, 0], finished.output
    kept, pieces = _kept(finished.output)
    assert (kept, pieces) == (done - 1, pieces)
    assert done < pieces
    growth = float(finished.output.split("memory of a rank up by at most ")[1].split()[0])
    assert growth * 2**30 < 3 / 8 * (smollm2 / "model.safetensors").stat().st_size  # 3 GiB of 8 GB
    assert_files_are_the_bases(case)
    assert_weights_are_the_sum(case, every=23)
    (tmp_path / "plain.py").write_text(PLAIN)
    loaded = start(
        [sys.executable, "-I", str(tmp_path / "plain.py"), str(case.merged), str(tmp_path / "logits")], tmp_path
    )
    assert loaded.codes == [0], loaded.output
    found = load_file(tmp_path / "logits")["logits"]
    adapted = logits(PeftModel.from_pretrained(case.load(case.base), plain_adapter(case), low_cpu_mem_usage=True))
    assert (found - adapted).abs().max() < TOLERANCE["float32"] * adapted.abs().max()


def _kept(output: str) -> tuple[int, int]:
    """Pieces that were there already, and all pieces."""
    kept, pieces = output.split(" pieces were there already")[0].split()[-3::2]
    return int(kept), int(pieces)


@pytest.fixture(params=[5, 1], ids=["five files", "one file"], scope="module")
def large(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, int]]:
    """A made Llama of 8 GB in bf16."""
    root = tmp_path_factory.mktemp("large")
    base = root / "base"
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=17,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(base)
    write_made_weights(base, config, request.param)
    yield make_case(root / "case", base, "bfloat16", adapter={"r": 16, "alpha": 32}), request.param
    shutil.rmtree(root)


def write_made_weights(folder: Path, config: Any, files: int) -> None:
    """The weights of a model, the same random numbers again and again, in so many files, without holding them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    noise = (torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    block = noise.view(torch.uint8).numpy().tobytes()
    index = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        mine = shapes[number * len(shapes) // files : (number + 1) * len(shapes) // files]
        described, end = {}, 0
        for key, shape in mine:
            described[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
            end = described[key]["data_offsets"][1]
            index[key] = name
        text = json.dumps({"__metadata__": {"format": "pt"}, **described}).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, len(block)):
                file.write(block[: end - start])
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_memory_that_8_gb_take(ranks: int, large: tuple[Case, int]) -> None:
    case, files = large
    size = sum(file.stat().st_size for file in case.base.glob("*.safetensors"))
    assert 7.9e9 < size < 8.5e9
    with (case.run.parent / "log").open("w") as log:
        processes = launch_ranks(ranks, ["export", str(case.config), "--format", "merged"], output=log)
        peaks = [0] * ranks
        while any(process.poll() is None for process in processes):
            peaks = [max(peak, _peak(process.pid)) for peak, process in zip(peaks, processes, strict=True)]
            time.sleep(0.02)
    output = (case.run.parent / "log").read_text()
    assert finish(processes).codes == [0] * ranks, output
    print(files, ranks, [f"{peak / 2**30:.2f} GiB" for peak in peaks], output.split("merge: ")[-1])
    assert all(2**28 < peak <= 3 * 2**30 for peak in peaks)
    assert_files_are_the_bases(case)
    for layer, kind in ((0, "self_attn.k_proj"), (8, "mlp.down_proj"), (16, "mlp.gate_proj")):
        key = f"model.layers.{layer}.{kind}"
        assert_is_the_sum(case, key, one(case.base, f"{key}.weight"), one(case.merged, f"{key}.weight"))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert one(case.merged, key).equal(one(case.base, key))
    shutil.rmtree(case.merged)


def one(folder: Path, key: str) -> torch.Tensor:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if key in opened.offset_keys():
                return opened.get_tensor(key)
    raise KeyError(key)


def _peak(pid: int) -> int:
    """The most memory that a process has had resident, in bytes; 0 once it is gone."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return 0
