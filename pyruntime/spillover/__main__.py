"""``python -m spillover`` is the command line."""

from spillover.cli import main

if __name__ == "__main__":
    main()
