"""`python -m sanctl` is the same as `sanctl`."""

from sanctl.cli.main import main

if __name__ == "__main__":
    main()
