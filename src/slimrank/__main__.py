"""`python -m slimrank` is the `slimrank` command."""

from slimrank.cli import main

if __name__ == "__main__":
    main()
