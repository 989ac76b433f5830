"""The program: `tintc`, or python -m tintc."""

import gc

from tintc import interrupts


def run() -> None:
    """Watches for Ctrl-C before anything else is imported, and until the process ends."""
    interrupts.watch_program()
    # Imports and graphs make millions of objects that live until the end: looking for cycles among
    # them again and again was a seventh of compiling a model.
    gc.set_threshold(200_000, 20, 20)
    from tintc.cli import main

    try:
        main()
    except SystemExit as ending:
        if ending.code == interrupts.EXIT_CODE:
            interrupts.end()
        raise
    finally:
        interrupts.finish_program()


if __name__ == "__main__":
    run()
