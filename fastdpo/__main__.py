"""`python -m fastdpo`: the command, where its script is not on the PATH."""

import sys

from fastdpo.cli import main

if __name__ == "__main__":  # a process that it spawns imports this file, too
    sys.exit(main())
