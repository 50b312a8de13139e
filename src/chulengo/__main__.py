"""`python -m chulengo` is the `chulengo` command."""

from chulengo.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
