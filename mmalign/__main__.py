"""`python -m mmalign` and the `mmalign` command."""

from mmalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
