"""Opening a listing of a million pictures: seconds, and memory that stays.

    python benchmarks/listing.py [--rows N]

Makes N empty files in 1,000 folders and a table of them in each form; every figure is of a fresh process. Memory is the
process's resident set after opening, less that before it (pyarrow loaded), and its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

OPEN = """
import gc, json, resource, sys, time
import pyarrow.parquet
from vitrail.data.sources import open_source

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

gc.collect()
before = resident()
start = time.perf_counter()
source = open_source(sys.argv[1])
seconds = time.perf_counter() - start
gc.collect()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"rows": len(source.paths), "seconds": round(seconds, 2), "MB": round((resident() - before) / 1e6),
                  "peak_MB": round((peak - before) / 1e6), "paths_MB": round(source.paths.num_bytes / 1e6)}))
"""


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=1_000_000)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for what in make(Path(place), chosen.rows):
            for attempt in range(3):
                done = subprocess.run(
                    [sys.executable, "-c", OPEN, str(what)], capture_output=True, text=True, check=True
                )
                print(what.name, attempt, done.stdout.strip())


def make(root: Path, rows: int) -> list[Path]:
    """Write the files and tables; return what to open."""
    import pyarrow
    import pyarrow.parquet

    paths = [f"pictures/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG" for number in range(rows)]
    for number in range(min(rows, 1000)):
        (root / "pictures" / f"n{number:08d}").mkdir(parents=True)
    for path in paths:
        (root / path).touch()
    labels = [path.split("/")[1] for path in paths]
    groups = [f"g{number // 5}" for number in range(rows)]
    splits = ["val" if number // 1000 % 10 == 0 else "train" for number in range(rows)]
    table = {"path": paths, "label": labels, "split": splits, "group": groups}
    pyarrow.parquet.write_table(pyarrow.table(table), root / "t.parquet")
    rows_of = list(zip(*table.values(), strict=True))
    (root / "t.csv").write_text("path,label,split,group\n" + "".join(",".join(row) + "\n" for row in rows_of))
    lines = (json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in rows_of)
    (root / "t.jsonl").write_text("".join(lines))
    return [root / "t.csv", root / "t.jsonl", root / "t.parquet", root / "pictures"]


if __name__ == "__main__":
    main()
