"""The benchmark harness: quality and speed of every model family, in one report. The same as `gigdiff bench`.

    python benchmarks/run.py --config configs/bench_quick.yaml
    python benchmarks/run.py --config configs/bench_full.yaml

What is measured is in gigdiff/benchmark.py, what the scores mean in docs/evaluation.md, the reports in
docs/benchmark.md.
"""

import sys

from gigdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
