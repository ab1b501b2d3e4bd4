"""`python -m gigdiff` is the `gigdiff` command."""

import sys

from gigdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
