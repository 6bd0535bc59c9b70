"""Check what `bnext train` reached: the median test accuracy of its runs, at least 0.985.

python tools/check_digits_accuracy.py runs
"""

import csv
import pathlib
import statistics
import sys

REQUIRED = 0.985


def main(folder: str) -> int:
    accuracies = {}
    for path in sorted(pathlib.Path(folder).glob("*/metrics.csv")):
        with path.open() as file:
            accuracies[path.parent.name] = float(list(csv.DictReader(file))[-1]["test_accuracy"])
    for run, accuracy in accuracies.items():
        print(f"{run}: test accuracy {accuracy:.4f}")
    median = statistics.median(accuracies.values())
    print(f"median {median:.4f}, required {REQUIRED}")
    return 0 if median >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
