"""Ctrl-C while a program starts: importing torch takes seconds, and cli.run takes over only then.

A KeyboardInterrupt in there ends in a traceback, or in a library's own `except`, and the program goes on, broken.
"""
import os
import signal


def at_ctrl_c(handler):
    """Have handler called at Ctrl-C, unless that is ignored: a script's background jobs are not meant to hear it."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def end(*_):
    """A handler that ends the program at once."""
    try:
        os.write(2, b"interrupted\n")
    finally:                                                         # even if stderr is closed
        os._exit(130)
