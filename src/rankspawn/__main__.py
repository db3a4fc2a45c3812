"""``python -m rankspawn`` is the ``rankspawn`` command."""

import signal
import sys


def main() -> int:
    # Ctrl-C ends a command as it ends a program in C, without a traceback. If Python raised KeyboardInterrupt, the
    # import of a module could swallow it, and the ranks would start. torch handles the signals of torchrun.
    if sys.argv[1:2] != ["torchrun"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ._cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
