"""Images a second of `vitrail check`, full and `--quick`, on a folder.

    python benchmarks/check.py path/to/photographs [--rounds 5]

Each round lists, decodes, hashes, compares and splits everything; nothing is cached between rounds but the files' pages.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

from vitrail.config import DataConfig
from vitrail.data.check.check import check_dataset


def main() -> None:
    """Measure both forms in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {"full": [], "quick": []}
    count, findings = 0, 0
    for _ in range(args.rounds):
        for form, values in speeds.items():
            started = time.perf_counter()
            checked = check_dataset(DataConfig(source=args.data), quick=form == "quick")
            count = checked.facts["num_images"]
            values.append(count / (time.perf_counter() - started))
            findings = len(checked.problems) if form == "full" else findings
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{os.cpu_count()} cores, {count:,} images, {findings} findings, n = {args.rounds}, peak memory {peak:,.0f} MiB"
    )
    for form, values in speeds.items():
        print(f"{form}: {statistics.median(values):,.0f} images/s ({min(values):,.0f} to {max(values):,.0f})")


if __name__ == "__main__":
    main()
