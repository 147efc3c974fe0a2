"""Images a second of `vitrail check`, full and quick form, on a folder.

    python benchmarks/check.py path/to/photographs [--rounds 5]

Each round lists, decodes, hashes, compares and divides everything; nothing is kept between rounds but the page cache.
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
    rates: dict[str, list[float]] = {"full": [], "quick": []}
    count, findings = 0, 0
    for _ in range(args.rounds):
        for form, found in rates.items():
            started = time.perf_counter()
            checked = check_dataset(DataConfig(source=args.data), quick=form == "quick")
            count = checked.facts["num_images"]
            found.append(count / (time.perf_counter() - started))
            findings = len(checked.problems) if form == "full" else findings
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{os.cpu_count()} cores, {count:,} images, {findings} findings, n = {args.rounds}, peak memory {peak:,.0f} MiB"
    )
    for form, found in rates.items():
        print(f"{form}: {statistics.median(found):,.0f} images/s ({min(found):,.0f} to {max(found):,.0f})")


if __name__ == "__main__":
    main()
