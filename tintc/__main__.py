"""python -m tintc."""

from tintc.cli import main

if __name__ == "__main__":
    main()
