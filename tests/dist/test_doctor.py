"""`mica-ds doctor`: what is broken is named, with its rank; what is sound is green."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT, Finished, free_ports, start_ranks

pytestmark = [pytest.mark.dist, pytest.mark.exclusive]

LIMIT = 120  # seconds
COLLECTIVES = ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all_single"]
TRIALS = [*COLLECTIVES[:3], *(f"{name} of bfloat16" for name in COLLECTIVES[:3]), "all_reduce of the highest"]


def findings(finished: Finished) -> dict[str, dict[str, Any]]:
    """The results by name, of which rank 0 prints one line."""
    (line,) = [line for line in finished.output.splitlines() if line.startswith("[{")]
    return {result["name"]: result for result in json.loads(line)}


def test_a_sound_cluster_is_green(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    settings = json.loads((ROOT / "configs/deepspeed/zero3-multinode.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    config = tiny_config(deepspeed=str(tmp_path / "deepspeed.json"))
    finished = start_ranks(2, ["doctor", str(config)])
    assert finished.codes == [0, 0], finished.output
    assert finished.output.count(" good ") == 12, finished.output
    assert "hpZ" in finished.output
    assert finished.seconds < LIMIT
    assert not (tmp_path / "run").exists()


def test_everything_broken_is_named_with_its_rank(
    tiny_config: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = json.loads((ROOT / "configs/deepspeed/zero3-offload-cpu.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # of 3 ranks
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "broken"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = tiny_config(
        model={"path": str(model), "dtype": "bfloat16"},
        data={"global_batch": 6},
        checkpoint={"keep": 1_000_000_000_000},
        deepspeed=str(tmp_path / "deepspeed.json"),
        tracking={"uri": f"http://127.0.0.1:{free_ports(1)[0]}"},
    )
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "Who?", "options": ["Edda"], "answer": 0}))
    other = tmp_path / "versions" / "peft-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    ailments = {
        "rank": 1,
        "versions": str(other.parent),
        "clock": 5,
        "output_dir": str(tmp_path / "elsewhere"),
        "collectives": COLLECTIVES,
        "link": 2,
        "one_core": True,
        "no_compiler": True,
        "hangs": False,
    }
    finished = start_ranks(3, ["doctor", str(config), "--json"], "tests.dist.ailing", AILMENTS=json.dumps(ailments))
    assert finished.codes == [2, 2, 2], finished.output
    assert finished.seconds < LIMIT
    found = findings(finished)
    expected = {
        "versions": ([1], "version.peft 0.0.1 instead of 0."),
        "clocks": ([1], "+5.0 s"),
        "machine": ([1], "cores 1 instead of "),
        "collectives": ([1], f"wrong result of {', '.join([*TRIALS, *COLLECTIVES[3:]])}, send and receive"),
        "links": ([1, 2], "ranks 1 and 2 exchange"),
        "compiled ops": ([1], "no C++ compiler (c++)"),
        "deepspeed": ([0, 1, 2], "zero_hpz_partition_size=2"),
        "folders": ([1], "is not the folder that rank 0 writes to"),
        "room": ([0, 1, 2], "1000000000002 checkpoints"),
        "model": ([0, 1, 2], "model.safetensors is truncated or damaged"),
        "data": ([0, 1, 2], "questions.jsonl, line 1"),
        "tracker": ([0], "cannot be used: [Errno 111] Connection refused"),
    }
    for name, (ranks, part) in expected.items():
        assert (found[name]["ranks"], found[name]["is_good"]) == (ranks, False), found[name]
        assert part in found[name]["detail"], found[name]
        assert found[name]["advice"], found[name]
    assert "ranks 1 and 2 need " in found["links"]["detail"]
    assert found.keys() == expected.keys()
    assert "Traceback" not in finished.output
    for folder in ("run", "elsewhere", "tokens"):
        assert not (tmp_path / folder).exists()
    (error,) = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: 12 of 12 checks failed: versions, clocks, ")


@pytest.mark.slow
def test_a_collective_that_hangs_is_a_finding_as_any_other(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    ailments = {
        "rank": 1,
        "versions": str(tmp_path),
        "clock": 0,
        "output_dir": str(tmp_path / "run"),
        "collectives": ["all_reduce"],
        "link": None,
        "one_core": False,
        "no_compiler": False,
        "hangs": True,
    }
    arguments = ["doctor", str(tiny_config()), "--json"]
    finished = start_ranks(2, arguments, "tests.dist.ailing", AILMENTS=json.dumps(ailments))
    assert finished.codes == [2, 2], finished.output
    assert finished.seconds < LIMIT
    found = findings(finished)
    assert found["collectives"]["ranks"] == [0, 1]
    assert found["collectives"]["detail"] == "all ranks: nothing came of it in 60 s"
    assert found["data"]["is_good"], found
