"""Stage `head`: `benchmarks.head` on the GPU."""

from benchmarks.head import main

if __name__ == "__main__":
    main()
