"""The report of real runs, opened in a real browser."""

import html
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file

from mica_ds.config import Config, load_config
from mica_ds.page import write_page

from .conftest import finish, launch_ranks, write_config

pytestmark = pytest.mark.dist

Views: TypeAlias = dict[tuple[str, int, str], dict[str, Any]]
Inputs: TypeAlias = tuple[Config, dict[str, Any], list[dict[str, float]], dict[str, Any]]

WIDTHS = (390, 768, 1400)
HOSTILE = "<script>alert(1)</script>.txt"

# Opens each page in a frame of each width (a window of chromium is 500 wide at least), and writes down what it sees.
LOOK = """<!doctype html><body><script>
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = colour => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
const ink = element => getComputedStyle(element)[element.tagName === "text" ? "fill" : "color"];
const ground = element => {
  const colour = getComputedStyle(element).backgroundColor;
  return colour === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : colour;
};
const look = (name, width, page) => {
  const all = selector => [...page.querySelectorAll(selector)];
  const texts = all("body *").filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  return {
    name, width,
    scrollWidth: page.documentElement.scrollWidth,
    spilling: all("body :not(svg, svg *)").filter(e => e.scrollWidth > e.clientWidth && e.clientWidth > 0)
      .map(e => e.outerHTML.slice(0, 80)),
    background: getComputedStyle(page.documentElement).backgroundColor,
    text: page.body.innerText,
    title: page.title,
    lang: page.documentElement.lang,
    headings: all("h1, h2, h3").map(e => Number(e.tagName[1])),
    scopeless: all("th:not([scope])").length,
    nameless: all("svg:not([role=img][aria-label])").length,
    figures: all("svg").map(e => e.getBoundingClientRect()).map(box => [box.left, box.right, box.height]),
    scripts: all("script").length,
    contrast: Math.min(...texts.map(e => contrast(ink(e), ground(e)))),
    snippet: page.querySelector("pre").textContent,
    requests: page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
  };
};
onload = () => {
  const frames = [...document.querySelectorAll("iframe")];
  const seen = frames.map(f => look(f.title, f.clientWidth, f.contentDocument));
  const output = document.createElement("pre");
  output.id = "seen";
  output.textContent = JSON.stringify(seen);
  document.body.replaceChildren(output);
};
</script>FRAMES</body>"""


@pytest.fixture(scope="module")
def runs(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two finished runs by their methods: MiCA with all scores on two ranks, full fine-tuning with none."""
    started, folders = [], {}
    for method, ranks in (("mica", 2), ("full", 1)):
        folder = tmp_path_factory.mktemp(method)
        corpus = folder / HOSTILE
        corpus.parent.mkdir()
        corpus.write_text("The Quillmar press was built in Torvane by Edda Brunholt. " * 40)
        scores: dict[str, Any] = {"every": 1} if method == "mica" else {"questions": None, "retention": None}
        config = write_config(
            folder,
            tiny_model("llama"),
            adapter={"method": method},
            data={"corpus": [str(corpus)]},
            evaluate=scores,
            train={"per_device_train_batch_size": 2, "max_steps": 2},
        )
        started.append(launch_ranks(ranks, ["train", str(config)], OMP_NUM_THREADS="1"))
        folders[method] = folder / "run"
    for processes in started:
        finished = finish(processes)
        assert set(finished.codes) == {0}, finished.output
    return folders


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("install chromium: the report is opened in it")
    return found


@pytest.fixture(scope="module")
def seen(browser: str, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Views:
    """What the browser sees of each run's page, by method, width and colour scheme."""
    pages = {method: folder / "report.html" for method, folder in runs.items()}
    return {
        (view["name"], view["width"], scheme): view
        for scheme in ("light", "dark")
        for view in _look(browser, pages, scheme, tmp_path_factory.mktemp(scheme))
    }


def _look(browser: str, pages: dict[str, Path], scheme: str, folder: Path) -> list[dict[str, Any]]:
    frames = [
        f'<iframe title="{name}" src="{page.as_uri()}" style="border: 0; width: {width}px"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    ]
    (folder / "look.html").write_text(LOOK.replace("FRAMES", "".join(frames)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--hide-scrollbars", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    command = [browser, *options, "--dump-dom", (folder / "look.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stdout + shown.stderr
    return json.loads(html.unescape(found[1]))


def test_it_fits_a_phone_and_a_wide_window_in_light_and_dark(seen: Views) -> None:
    assert {(method, width, scheme) for method, width, scheme in seen} == {
        (method, width, scheme) for method in ("mica", "full") for width in WIDTHS for scheme in ("light", "dark")
    }
    for (method, width, scheme), view in seen.items():
        assert view["scrollWidth"] <= width, (method, width, scheme)
        assert view["spilling"] == []
        assert len(view["figures"]) == (9 if method == "mica" else 1)  # a loss; a score and seven kinds of weights
        for left, right, height in view["figures"]:
            assert 0 <= left < right <= width
            assert height > 50
        assert view["contrast"] >= 4.5, (method, width, scheme)
    assert len({view["background"] for view in seen.values()}) == 2


def test_it_can_be_read_aloud(seen: Views) -> None:
    for view in seen.values():
        assert view["lang"] == "en"
        assert view["title"]
        assert view["scopeless"] == view["nameless"] == 0
        levels = view["headings"]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert levels.count(1) == 1


def test_it_asks_for_nothing_and_runs_nothing(runs: dict[str, Path], seen: Views) -> None:
    for view in seen.values():
        assert view["requests"] == []
        assert view["scripts"] == 0
        assert HOSTILE in view["text"]
    for folder in runs.values():
        page = (folder / "report.html").read_text()
        assert "://" not in page
        assert "url(" not in page.replace("url(#", "")
        assert len(page) < 1_000_000


def test_it_tells_what_the_run_came_to(runs: dict[str, Path], seen: Views) -> None:
    summary = json.loads((runs["mica"] / "summary.json").read_text())
    assert summary["questions"] == 5
    assert summary["chance"] == pytest.approx(1 / 3)
    text = seen["mica", 390, "light"]["text"].replace("\N{NO-BREAK SPACE}", " ")
    before, after = summary["knowledge_before"], summary["knowledge_after"]
    retention = [summary[f"retention_{name}"] for name in ("before", "after")]
    for told in (
        f"{100 * before:.1f} % → {100 * after:.1f} %",
        f"× {retention[1] / retention[0]:.2f}",
        f"It had {round(5 * before)} right before the training and {round(5 * after)} after it",
        "guessing would get 33.3 %",
        f"Question by question, the change is {100 * (after - before):+.1f} points".replace("-", "\N{MINUS SIGN}"),
        *(f"{value:.2f}" for value in retention),
        f"{summary['final_loss']:.3f}",
        f"{summary['trainable_parameters']:,}",
        f"{summary['lora_trainable_parameters']:,}",
        f"{summary['train_seconds']:.1f} s",
        f"{summary['tokens']} tokens in 2 steps",
        "step 1",
        "2 ranks on 1 host",
        f"{HOSTILE}\tlearnt\t1\t2.3 KiB",
    ):
        assert told in text
    assert seen["full", 390, "light"]["text"].count("not measured") == 2


@pytest.mark.parametrize("method", ["mica", "full"])
def test_what_it_says_of_loading_loads_the_trained_model(method: str, runs: dict[str, Path], seen: Views) -> None:
    namespace: dict[str, Any] = {}
    exec(seen[method, 1400, "light"]["snippet"], namespace)
    probe = load_file(runs[method] / "probe.safetensors")
    with torch.no_grad():
        logits = namespace["model"].eval()(input_ids=probe["input_ids"]).logits
    assert (logits - probe["logits"]).abs().max() <= 1e-4 * probe["logits"].abs().max()
    assert namespace["tokenizer"].decode(probe["input_ids"][0])


@pytest.fixture
def inputs(runs: dict[str, Path]) -> Inputs:
    """What the page of the first run was made from."""
    folder = runs["mica"]
    state = json.loads((folder / "checkpoints/step-000002/trainer_state.json").read_text())
    return (
        load_config(folder / "config.yaml"),
        json.loads((folder / "summary.json").read_text()),
        state["log_history"],
        json.loads((folder / "basis/manifest.json").read_text()),
    )


def test_lora_has_no_spectra_but_an_adapter(inputs: Inputs, tmp_path: Path) -> None:
    config, summary, history, _ = inputs
    adapter = config.adapter.model_copy(update={"method": "lora"})
    lora = config.model_copy(update={"adapter": adapter, "output_dir": tmp_path})
    page = write_page(lora, summary, history, None).read_text()
    assert "LoRA of rank 4" in page
    assert "Spectra" not in page
    assert html.escape(repr(str(tmp_path / "adapter")), quote=True).replace("&#x27;", "&#39;") in page


def test_warnings_stand_out_and_only_where_there_are_any(inputs: Inputs, tmp_path: Path) -> None:
    config, summary, history, manifest = inputs
    config = config.model_copy(update={"output_dir": tmp_path})
    for record in manifest["matrices"]:
        record["unconverged"] = False
        record["relative_gap"], record["sigma_minor"] = 0.1, [0.1] * 4
    assert "<h2>Warnings</h2>" not in write_page(config, summary, history, manifest).read_text()
    manifest["matrices"][0]["unconverged"] = True
    page = write_page(config, {**summary, "skipped_steps": 1}, history, manifest).read_text()
    assert "1 of 2 steps changed nothing" in page
    assert "took a slower one" in page


def test_a_long_run_and_texts_that_are_gone_still_make_a_small_page(inputs: Inputs, tmp_path: Path) -> None:
    config, summary, _, manifest = inputs
    data = config.data.model_copy(update={"corpus": [tmp_path / "gone.txt", tmp_path / "gone"]})
    config = config.model_copy(update={"data": data, "output_dir": tmp_path})
    noise = torch.rand(50_000).tolist()
    history = [{"step": i + 1, "loss": loss, "epoch": i / 100} for i, loss in enumerate(noise)]
    history[7]["loss"] = float("nan")
    page = write_page(config, {**summary, "retention_after": float("inf")}, history, manifest)
    assert page.stat().st_size < 500_000
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
