"""Opening a dataset of a million images: seconds, and memory that stays.

    python benchmarks/listing.py [--rows N] [--only FORM…]

Makes N empty files in 1,000 folders, a table of them in each form, and 100 tar shards of N samples (100 bytes as image,
and a .cls); every figure is of a fresh process, the first of each form with an empty cache. Memory is the
process's resident set after opening, less that before it (pyarrow loaded), and its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FORMS = ["t.csv", "t.jsonl", "t.parquet", "images", "shards"]
OPEN = """
import gc, json, resource, sys, time
import pyarrow.parquet
from vitrail.data.datasets.open import open_dataset

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

gc.collect()
before = resident()
start = time.perf_counter()
dataset = open_dataset(sys.argv[1])
seconds = time.perf_counter() - start
gc.collect()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"rows": len(dataset.paths), "seconds": round(seconds, 2), "MB": round((resident() - before) / 1e6),
                  "peak_MB": round((peak - before) / 1e6), "paths_MB": round(dataset.paths.num_bytes / 1e6)}))
"""


def main() -> None:
    """Write the datasets, open each several times, and print a line per opening."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--attempts", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets = make(Path(folder), args.rows) if set(args.only) - {"shards"} else []
        if "shards" in args.only:
            datasets.append(make_shards(Path(folder) / "shards", args.rows))
        for path in (path for path in datasets if path.name in args.only):
            cache = Path(folder) / f"cache-{path.name}"
            for attempt in range(args.attempts):
                done = subprocess.run(
                    [sys.executable, "-c", OPEN, str(path)],
                    capture_output=True, text=True, check=True, env=os.environ | {"VITRAIL_CACHE": str(cache)},
                )  # fmt: skip
                cached = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
                print(path.name, attempt, done.stdout.strip(), f"cached {cached / 1e6:.0f} MB", flush=True)


def make(root: Path, rows: int) -> list[Path]:
    """Write the files and tables; return the paths to open."""
    import pyarrow
    import pyarrow.parquet

    paths = [f"images/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(rows)]
    for number in range(min(rows, 1000)):
        (root / "images" / f"n{number:08d}").mkdir(parents=True)
    for path in paths:
        (root / path).touch()
    labels = [path.split("/")[1] for path in paths]
    groups = [f"g{number // 5}" for number in range(rows)]
    splits = ["val" if number // 1000 % 10 == 0 else "train" for number in range(rows)]
    table = {"path": paths, "label": labels, "split": splits, "group": groups}
    pyarrow.parquet.write_table(pyarrow.table(table), root / "t.parquet")
    table_rows = list(zip(*table.values(), strict=True))
    (root / "t.csv").write_text("path,label,split,group\n" + "".join(",".join(row) + "\n" for row in table_rows))
    lines = (json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in table_rows)
    (root / "t.jsonl").write_text("".join(lines))
    return [root / "t.csv", root / "t.jsonl", root / "t.parquet", root / "images"]


def make_shards(folder: Path, rows: int, number: int = 100) -> Path:
    """Write shards whose images are only bytes, no images; return their folder."""
    folder.mkdir()
    for shard in range(number):
        with (folder / f"train-{shard:06d}.tar").open("wb") as file:
            for row in range(shard, rows, number):
                for name, content in ((f"{row:08d}.jpg", b"x" * 100), (f"{row:08d}.cls", str(row % 1000).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
            file.write(bytes(1024))
    return folder


if __name__ == "__main__":
    main()
