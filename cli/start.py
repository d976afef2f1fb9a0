"""cli/start.py — the first import of a command: from then on what stops another is one line.

Importing torch takes seconds, in which one may press Ctrl-C, and it may be missing. This file
needs Python alone.
"""
import os
import signal
import sys
from pathlib import Path

# torch's own lines, some with a trace of C++, about what also is an error in Python
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def one_line(kind, error, trace):
    """As sys.excepthook: end the program in a line, with status 130 for Ctrl-C, 2 for imports."""
    if issubclass(kind, KeyboardInterrupt):
        line, status = "stopped", 130
    elif issubclass(kind, ImportError):
        line, status = str(error), 2
        if issubclass(kind, ModuleNotFoundError):
            line += ": copy all of the folder, and pip install -r requirements.txt"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)


def stop(*_):
    """On Ctrl-C, in place of KeyboardInterrupt, which callbacks of Python's own imports swallow.

    There is nothing to put in order yet. cli/run.py's guarded() ends this.
    """
    print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = one_line
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
try:
    os.getcwd()                               # without it torch ends the process while it is loaded
except FileNotFoundError as gone:
    raise ImportError("the current folder has been removed: cd into another one") from gone
