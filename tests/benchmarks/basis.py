"""What the basis engine takes, against what peft does today and against the floor of one factorisation.

    python tests/benchmarks/basis.py [--only ROW ...] [--out FILE.json]

Both sides of a ratio run in the same processes with the same threads, one after the other, on an otherwise idle
machine. A time is the slowest rank's, the best of 2 where it is below 10 s, else of one run (and of one run where the
work changes its model), after a few small solves and SVDs to warm up. The weights are trained-like (`trained_like`)
but for SmolLM2's, which are real. Ours reads a checkpoint's file, from the page cache; the SVDs find it in memory.

Rows:
    4096x4096, 14336x4096, 4096x14336   one matrix in one process, on one thread and on all cores; its floor is the
                                        fastest of LU (where square: of others it gives no inverse), QR of the long
                                        side, and a symmetric Gram with Cholesky, in fp64 and in fp32
    smollm2                             all its linear layers under ZeRO-3, 2 ranks x 1 thread
    llama8b                             the 7 matrices of a Llama-3-8B layer from a file, on 2 ranks and on 1
    llama70b                            the same of a Llama-3-70B layer, with the memory of a rank, and the schedule of
                                        the whole model on 2 to 1024 ranks, from partitions and from files, by rates
                                        of work measured on the spot
    gpu                                 on one GPU with fp64 units, against torch's SVD there: the three single
                                        matrices, and the layers of both from a file; only where it is asked for
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from common import (
    CORES,
    GIB,
    ROOT,
    Found,
    Row,
    console,
    memory,
    print_rows,
    reset_peak,
    run_ranks,
    run_row,
    say,
    write_json,
)
from rich.table import Table
from safetensors.torch import load_file, save_file

from mica_ds import comm, factor, solver, symmetric

R = 16
LONG = 10.0  # seconds from which one run is enough
MEMORY_LIMIT = 6 * GIB

Shape = tuple[int, int]


def llama_layer(hidden: int, key_value: int, intermediate: int) -> dict[str, Shape]:
    """The (out, in) shapes of a Llama layer by name."""
    attention = {"q_proj": hidden, "k_proj": key_value, "v_proj": key_value, "o_proj": hidden}
    mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    return {name: (out, hidden) for name, out in attention.items()} | mlp


SINGLE: dict[Shape, float] = {(4096, 4096): 10, (14336, 4096): 5, (4096, 14336): 5}
"""The matrices that are solved alone, and how many times faster than the SVD they have to be."""
LLAMA_8B = llama_layer(4096, 1024, 14336)
LLAMA_70B = llama_layer(8192, 1024, 28672)


def trained_like(shape: Shape, seed: int) -> torch.Tensor:
    """A weight in bf16 with roughly the spectrum of a trained one.

    A bulk whose rows and columns differ a little in scale, and 64 outlier directions that fall from 30 times the bulk's
    edge to twice.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    row_scales, column_scales = ((0.1 * draw(size)).exp() for size in shape)
    U, V = (torch.linalg.qr(draw(size, 64)).Q for size in shape)
    edge = shape[0] ** 0.5 + shape[1] ** 0.5
    U *= torch.logspace(1, 0, 64, base=15.0) * 2 * edge
    W = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, shape[0], 1024):  # in parts, to save memory
        part = slice(start, start + 1024)
        bulk = draw(len(W[part]), shape[1]) * column_scales * row_scales[part, None]
        W[part] = bulk.addmm_(U[part], V.T) * 0.02  # as large as trained weights are
    return W


# What rank processes run. Each `time_…` returns its figures, which rank 0 hands to the command. What imports DeepSpeed
# is imported inside, after `comm.start`.


def timed(work: Callable[..., object], prepare: Callable[[], tuple[Any, ...]] = tuple, runs: int = 2) -> float:
    """Seconds that the slowest rank takes for `work(*prepare())`, the best of some short runs. Collective."""
    best = float("inf")
    for _ in range(runs):
        arguments = prepare()
        settle()
        comm.barrier()
        started = time.perf_counter()
        work(*arguments)
        settle()
        seconds = max(comm.gather(time.perf_counter() - started))
        best = min(best, seconds)
        if seconds >= LONG:
            break
    return best


def settle() -> None:
    """Wait for what the GPU still has to do. Local."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stock_svd(W_MN: torch.Tensor) -> torch.Tensor:
    """What peft calls for each weight."""
    return torch.linalg.svd(W_MN.float(), full_matrices=False)[0]


def time_matrix(_: Path, out: int, into: int, place: str) -> Found:
    """Ours, the SVD and the floors of one fp32 matrix, on the CPU or on the GPU."""
    W = trained_like((out, into), seed=0).float().to(place)
    ours = timed(lambda: solver.solve(W, R))
    floors = time_floors(W) if place == "cpu" else {"Gram and Cholesky": timed(lambda: gram_cholesky(W))}
    return {"ours": ours, "svd": timed(lambda: stock_svd(W)), "floors": floors}


def gram_cholesky(W_MN: torch.Tensor) -> torch.Tensor:
    """The floor on a GPU, by torch and in fp64."""
    T_KL = (W_MN if W_MN.shape[0] <= W_MN.shape[1] else W_MN.T).double()
    return torch.linalg.cholesky(T_KL @ T_KL.T)


def time_floors(W_MN: torch.Tensor) -> dict[str, float]:
    """Seconds of each factorisation alone, casts left out."""
    T_KL = W_MN if W_MN.shape[0] <= W_MN.shape[1] else W_MN.T
    T64_LK = T_KL.double().contiguous().numpy().T
    G_KK = np.zeros((len(T_KL), len(T_KL)), order="F")

    def gram_cholesky() -> None:
        G = scipy.linalg.blas.dsyrk(1.0, T64_LK, c=G_KK, trans=True, lower=True, overwrite_c=True)
        scipy.linalg.lapack.dpotrf(G, lower=True, overwrite_a=True, clean=False)

    T32_LK = T_KL.contiguous().numpy().T

    def gram_cholesky32() -> None:
        G = scipy.linalg.blas.ssyrk(1.0, T32_LK, trans=True, lower=True)
        scipy.linalg.lapack.spotrf(G, lower=True, overwrite_a=True, clean=False)

    floors = {"qr": timed(lambda: torch.linalg.qr(T_KL.T, mode="r")), "dsyrk and dpotrf": timed(gram_cholesky)}
    floors["ssyrk and spotrf"] = timed(gram_cholesky32)
    if W_MN.shape[0] == W_MN.shape[1]:
        in_place = functools.partial(scipy.linalg.lapack.sgetrf, overwrite_a=True)
        floors["sgetrf"] = timed(in_place, lambda: (W_MN.clone().numpy().T,))
        floors["lu_factor"] = timed(lambda: torch.linalg.lu_factor(W_MN))
    return floors


def time_smollm2(folder: Path) -> Found:
    """Ours and peft's initialisation of one partitioned model."""
    from peft import LoraConfig, get_peft_model

    from mica_ds.adapter import target_modules
    from mica_ds.arguments import training_arguments
    from mica_ds.basis import build_basis
    from mica_ds.config import load_config
    from mica_ds.model import load_model
    from mica_ds.shards import PartitionSource

    overrides = [f"model.path={ROOT}/models/smollm2-135m", f"output_dir={folder}/run", f"adapter.r={R}"]
    config = load_config(ROOT / "configs/demonstration.yaml", overrides)
    _arguments = training_arguments(config)  # alive while the model is built: zero.Init takes its settings from it
    model = load_model(config.model)
    source = PartitionSource(target_modules(model, config.adapter))
    ours = timed(functools.partial(build_basis, source, config.adapter, config.basis, 0), new_caches(folder))
    stock = LoraConfig(r=R, target_modules="all-linear", init_lora_weights="mica", task_type="CAUSAL_LM")
    return {"ours": ours, "peft": timed(lambda: get_peft_model(model, stock), runs=1), "matrices": records(folder)}


def time_layer(folder: Path, file: str, other: str = "") -> Found:
    """Ours of a file's matrices with the memory of each rank, and what `other` names: the SVDs or the schedule."""
    from mica_ds.basis import build_basis
    from mica_ds.config import AdapterSettings, BasisSettings
    from mica_ds.shards import CheckpointSource, Matrix, StoredMatrix
    from mica_ds.weights import open_checkpoint

    tensors = open_checkpoint(folder, [Path(file)]).items()
    stored = [StoredMatrix(Matrix(name, (t.shape[0], t.shape[1]), is_transposed=False), t) for name, t in tensors]
    source = CheckpointSource(stored, torch.bfloat16)
    build = functools.partial(build_basis, source, AdapterSettings(r=R), BasisSettings(), 0)
    loaded = comm.gather(memory("VmRSS"))
    reset_peak()
    found: Found = {"ours": timed(build, new_caches(folder)), "loaded": loaded}
    found |= {"peak": comm.gather(memory("VmHWM")), "matrices": records(folder)}
    if other == "svd":
        weights = load_file(file, device="cuda" if torch.cuda.is_available() else "cpu").values()
        found["svd"] = timed(lambda: [stock_svd(W) for W in weights])  # all of them on every rank, as in peft
    if other == "schedule":
        rates = measure_rates()
        found |= {"rates": rates, "predicted": simulate(1, comm.world_size(), rates, is_sliced=False)["seconds"]}
        for place, is_sliced in (("partitions", True), ("files", False)):
            found[place] = [simulate(80, 1 << doublings, rates, is_sliced) for doublings in range(1, 11)]
    return found


def time_gpu(folder: Path) -> Found:
    """All that the row `gpu` compares, in one process, whose GPU is warm then."""
    W = trained_like((1536, 768), seed=0).cuda()
    solver.solve(W, R)
    stock_svd(W)
    found = {f"{shape}": time_matrix(folder, *shape, place="cuda") for shape in SINGLE}
    layers = [folder / "8B", folder / "70B"]
    return found | {layer.name: time_layer(layer, str(layer / "layer.safetensors"), other="svd") for layer in layers}


def new_caches(folder: Path) -> Callable[[], tuple[Path]]:
    """Names another folder at each call, the same on all ranks."""
    numbers = itertools.count()
    return lambda: (folder / f"bases-{comm.world_size()}-{next(numbers)}",)


def records(folder: Path) -> Any:
    """What the first manifest says of each matrix."""
    return json.loads((folder / f"bases-{comm.world_size()}-0" / "manifest.json").read_text())["matrices"]


def measure_rates() -> dict[str, float]:
    """What a rank does a second of each kind of work that `factor.work` counts, while all are busy. Collective."""
    k, long = 4096, 8192
    T_KL = trained_like((k, long), seed=0)
    G_KK = factor.shared_gram(T_KL)
    L_KK = torch.from_numpy(scipy.linalg.cholesky(G_KK.numpy(), lower=True))
    X_KQ = torch.randn(k, factor.block_width(R))
    small = T_KL[:1024]
    corner, wanted = factor.gram(small).numpy(), [0, X_KQ.shape[1] - 1]
    sgetrf = functools.partial(scipy.linalg.lapack.sgetrf, overwrite_a=True)
    spotrf = functools.partial(scipy.linalg.lapack.spotrf, lower=True, overwrite_a=True, clean=False)
    return {
        "lu": 2 / 3 * k**3 / timed(sgetrf, lambda: (T_KL[:, :k].float().numpy().T,)),
        "gram32": long * k**2 / timed(lambda: factor.shared_gram(T_KL)),
        "cholesky32": k**3 / 3 / timed(spotrf, lambda: (G_KK.numpy().copy(order="F"),)),
        "gram": long * len(small) ** 2 / timed(lambda: factor.gram(small)),
        "eigh": 4 / 3 * len(corner) ** 3 / timed(lambda: scipy.linalg.eigh(corner, subset_by_index=wanted)),
        "bytes": 4 * k**2 / timed(lambda: symmetric.solve(L_KK, X_KQ)),  # half of a square, twice
    }


def simulate(layers: int, ranks: int, rates: dict[str, float], is_sliced: bool) -> Found:
    """The schedule of layers of Llama-3-70B: loads by measured rates, and bytes received. Local.

    From ZeRO-3's slices, or from files. The owners and helpers are those that the engine chooses, by its own fixed
    rates. What a matrix on the Gram route costs, and all that is received for a matrix, is counted as its owner's.
    """
    from mica_ds import schedule
    from mica_ds.shards import Matrix

    machine = schedule.Machine(ranks, itemsize=2, memory=MEMORY_LIMIT, is_sliced=is_sliced, is_on_host=True, threads=1)
    matrices = [Matrix(f"{i}.{name}", shape, False) for i in range(layers) for name, shape in LLAMA_70B.items()]
    assignment = schedule.assign(matrices, R, machine)
    load = [factor.seconds(work, rates) for work in schedule.rank_work(matrices, assignment, R, ranks)]
    received = [0] * ranks
    for owner, moved in zip(assignment.owners, schedule.moved_bytes(matrices, assignment, R, machine), strict=True):
        received[owner] += moved
    by_gram = sum(schedule.choose_route(matrix, R, machine) == "gram" for matrix in matrices)
    seconds = max(load)
    found: Found = {"ranks": ranks, "seconds": seconds, "balance": sum(load) / ranks / seconds, "by_gram": by_gram}
    return {**found, "shared": len(assignment.helpers), "bytes": sum(received), "most_received": max(received)}


WORKS: dict[str, Callable[..., Found]] = {
    work.__name__: work for work in (time_matrix, time_smollm2, time_layer, time_gpu)
}


def run_rank(work: str, folder: Path, arguments: Found) -> None:
    """One rank process, from start to exit."""

    def body() -> None:
        for shape in ((640, 640), (1536, 768)):  # the libraries load and start their threads
            W = trained_like(shape, seed=0)
            solver.solve(W, R)
            stock_svd(W)
        found = WORKS[work](folder, **arguments)
        if comm.is_main():
            (folder / "found.json").write_text(json.dumps(found))

    comm.run(body)


# What the command does: a function a row, in a folder of its own.


def one_matrix(shape: Shape, at_least: float, folder: Path) -> tuple[list[Row], Found]:
    rows, details = [], {}
    for threads in sorted({1, CORES}):
        layout = f"1 x {threads}"
        found = run_ranks(__file__, time_matrix, folder, 1, threads, out=shape[0], into=shape[1], place="cpu")
        rows += rows_of_matrix(shape, layout, found, at_least)
        details[layout] = found
    return rows, details


def rows_of_matrix(shape: Shape, layout: str, found: Found, at_least: float) -> list[Row]:
    work = f"{shape[0]} x {shape[1]}"
    floors = dict(found["floors"])
    rough = floors.pop("ssyrk and spotrf", None)  # no factor to be right by itself: it squares the condition number
    floor, seconds = min(floors.items(), key=lambda item: item[1])
    rows = [
        Row(work, "torch.linalg.svd", layout, found["ours"], found["svd"], at_least=at_least),
        Row(work, f"floor: {floor}", layout, found["ours"], seconds, at_most=1.6),
    ]
    if rough and shape[0] != shape[1]:
        rows.append(Row(work, "floor in fp32: ssyrk and spotrf", layout, found["ours"], rough, at_most=1.6))
    return rows


def smollm2(folder: Path) -> tuple[list[Row], Found]:
    found = run_ranks(__file__, time_smollm2, folder, 2, 1)
    return [Row("SmolLM2 under ZeRO-3", "peft's init", "2 x 1", found["ours"], found["peft"], at_least=8)], found


def llama8b(folder: Path) -> tuple[list[Row], Found]:
    file = write_layer(LLAMA_8B, folder)
    two = run_ranks(__file__, time_layer, folder, 2, 1, file=file, other="svd")
    one = run_ranks(__file__, time_layer, folder, 1, 1, file=file)
    rows = [
        Row("Llama-3-8B layer", "torch.linalg.svd", "2 x 1", two["ours"], two["svd"], at_least=10),
        Row("Llama-3-8B layer", "itself on 1 x 1", "2 x 1", two["ours"], one["ours"], at_least=1.8),
    ]
    return rows, {"2 x 1": two, "1 x 1": one}


def llama70b(folder: Path) -> tuple[list[Row], Found]:
    found = run_ranks(__file__, time_layer, folder, 2, 1, file=write_layer(LLAMA_70B, folder), other="schedule")
    work, peak = "Llama-3-70B layer", max(found["peak"])
    growth = max(map(int.__sub__, found["peak"], found["loaded"]))
    rows = [
        Row(work, "the schedule's prediction", "2 x 1", found["ours"], found["predicted"]),
        Row(f"{work}: peak of a rank", "the limit", "2 x 1", peak / GIB, MEMORY_LIMIT / GIB, at_most=1, unit="GiB"),
        Row(f"{work}: growth", "the limit", "2 x 1", growth / GIB, MEMORY_LIMIT / GIB, at_most=1, unit="GiB"),
    ]
    return rows, found


def gpu(folder: Path) -> tuple[list[Row], Found]:
    layers = {"8B": LLAMA_8B, "70B": LLAMA_70B}
    for name, shapes in layers.items():
        (folder / name).mkdir()
        write_layer(shapes, folder / name)
    found = run_ranks(__file__, time_gpu, folder, 1, CORES)
    rows = [
        row for shape, at_least in SINGLE.items() for row in rows_of_matrix(shape, "1 GPU", found[f"{shape}"], at_least)
    ]
    for name in layers:
        layer = found[name]
        rows.append(Row(f"Llama-3-{name} layer", "torch.linalg.svd", "1 GPU", layer["ours"], layer["svd"], at_least=10))
    return rows, found


def write_layer(shapes: dict[str, Shape], folder: Path) -> str:
    """A layer's weights in bf16 as a safetensors file."""
    file = folder / "layer.safetensors"
    say(f"writing {file} ...")
    save_file({name: trained_like(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}, file)
    return str(file)


ON_CPUS: dict[str, Callable[[Path], tuple[list[Row], Found]]] = {
    **{f"{shape[0]}x{shape[1]}": functools.partial(one_matrix, shape, at_least) for shape, at_least in SINGLE.items()},
    "smollm2": smollm2,
    "llama8b": llama8b,
    "llama70b": llama70b,
}
ROWS = {**ON_CPUS, "gpu": gpu}


def print_schedule(place: str, schedule: list[Found]) -> None:
    columns = "ranks", "seconds", "balance", "GiB moved", "to one rank", "by Gram", "shared"
    table = Table(*columns, title=f"all of Llama-3-70B from {place}")
    for entry in schedule:
        moved = (f"{entry[key] / GIB:.2f}" for key in ("bytes", "most_received"))
        counts = (str(entry[key]) for key in ("by_gram", "shared"))
        table.add_row(str(entry["ranks"]), f"{entry['seconds']:.1f}", f"{entry['balance']:.3f}", *moved, *counts)
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ON_CPUS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the same figures, and more, as JSON")
    parser.add_argument("--as-rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        work, folder, arguments = options.as_rank
        run_rank(work, Path(folder), json.loads(arguments))
    rows: list[Row] = []
    details: Found = {}
    for name in options.only:
        found, details[name] = run_row(name, ROWS[name])
        rows += found
    print_rows(rows)
    if "llama70b" in details:
        for place in ("partitions", "files"):
            print_schedule(place, details["llama70b"][place])
    if options.out:
        write_json(options.out, rows, details)


if __name__ == "__main__":
    main()
