"""The program: `tintc`, or python -m tintc."""

from tintc import interrupts


def run() -> None:
    """Watches for Ctrl-C before anything else is imported, and until the process ends."""
    interrupts.watch_program()
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
