"""A batch from the prefix cache: one gather beside a loop over its rows, of the same cache, bit for bit the same.

    python benchmarks/gather.py --device cpu

Rows are short, as of GLUE's tasks, and a batch has like lengths. For every place and width: the median microseconds of
a batch over `--batches` of them, the two ways in turns on the same batches. The loop copies each row's entry by itself
into zeros, in pinned memory where the device is a GPU. Results go to benchmarks/results/gather_<device>.json and .md.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from torch import Tensor

from progtuning.base.files import write_json, write_text
from progtuning.report import tables
from progtuning.speed.cache import PrefixCache
from progtuning.step.device import choose_device

PLACES = ("memory", "disk", "device")


def loop(cache: PrefixCache, rows: np.ndarray, length: int, device: torch.device) -> Tensor:
    """What `PrefixCache.fetch` gives where all is kept, row by row: (B, S, D) float32 on `device`."""
    states = cache._states
    pin = device.type == "cuda" and states.device.type == "cpu"
    x = torch.zeros(len(rows), length, states.shape[1], dtype=states.dtype, device=states.device, pin_memory=pin)
    for entry, row in zip(x, rows):
        size = cache.lengths[row]
        entry[:size] = states[cache.starts[row] : cache.starts[row] + size]
    return x.to(device, non_blocking=True).float()


def measure(place: str, width: int, args: argparse.Namespace, device: torch.device) -> list[float]:
    """Return the microseconds a batch of the loop and of the gather. Raises AssertionError where they differ."""
    draw = np.random.default_rng(0)
    lengths = np.sort(draw.integers(args.shortest, args.longest + 1, args.rows))
    filling = torch.randn(args.batch_size, args.longest, width, device=device)
    taken: dict = {loop: [], PrefixCache.fetch: []}
    with PrefixCache(lengths, width, place, device=device) as cache:
        for rows in np.split(np.arange(args.rows), range(args.batch_size, args.rows, args.batch_size)):
            size = int(lengths[rows].max())
            cache.fetch(rows, 1, size, device, lambda *_, rows=rows, size=size: filling[: len(rows), :size])
        for start in draw.integers(0, args.rows - args.batch_size, args.batches):
            rows = np.arange(start, start + args.batch_size)
            found, size = [], int(lengths[rows].max())
            for way, ran in taken.items():
                begin = time.perf_counter()
                found.append(
                    loop(cache, rows, size, device) if way is loop else way(cache, rows, 1, size, device, None)
                )
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ran.append(1e6 * (time.perf_counter() - begin))
            real = torch.arange(size) < torch.from_numpy(lengths[rows])[:, None]
            assert torch.equal(*(x.cpu()[real] for x in found))
    return [statistics.median(ran) for ran in taken.values()]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; default: CUDA where there is one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768], help="hidden sizes")
    parser.add_argument("--rows", type=int, default=4000, help="examples that are kept")
    parser.add_argument("--shortest", type=int, default=5, help="tokens")
    parser.add_argument("--longest", type=int, default=30, help="tokens")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder of the results (%(default)s)")
    args = parser.parse_args(arguments)
    harness.check_positive(args, "batch_size", "widths", "rows", "shortest", "longest", "batches")
    device = choose_device(args.device)
    settings = {key: getattr(args, key) for key in ("batch_size", "rows", "shortest", "longest", "batches")}
    made = harness.environment(device, settings)
    document = made | {"runs": [harness.this_run(__file__, arguments)], "rows": []}
    for width in args.widths:
        for place in PLACES:
            by_row, at_once = measure(place, width, args, device)
            document["rows"].append({"cache": place, "width": width, "loop": by_row, "gather": at_once})
    cells = [
        [row["cache"], row["width"], f"{row['loop']:.0f}", f"{row['gather']:.0f}", f"{row['loop'] / row['gather']:.1f}"]
        for row in document["rows"]
    ]
    text = tables.table(["--cache", "width", "loop, µs", "gather, µs", "times faster"], cells)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"gather_{device.type}.json"
    write_json(path, document)
    write_text(path.with_suffix(".md"), f"# A batch from the prefix cache\n{harness.describe(document)}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    harness.run_script(main)
