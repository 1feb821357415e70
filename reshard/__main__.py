"""`reshard` and `python -m reshard`: the command line. Until it is loaded, whoever stops it gets a quick end and no
traceback.
"""

import os
import signal


def stop(number: int, _: object) -> None:
    """Nothing has been begun, so nothing is to be cleared up. The exit code is a shell's for a process that ended by a
    signal.
    """
    os._exit(128 + number)


def main() -> None:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    from .cli import main

    main()


if __name__ == "__main__":
    main()
