"""`python -m e4t_cli` is `e4t`."""

from e4t_cli.cli.app import main

if __name__ == "__main__":
    main()
