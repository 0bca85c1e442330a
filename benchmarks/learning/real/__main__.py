"""`python -m benchmarks.learning.real`: see run.py, which the processes that it starts can import."""

import sys

from benchmarks.learning.real.run import main

if __name__ == "__main__":
    sys.exit(main())
