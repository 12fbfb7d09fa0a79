"""A process and the one that started it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def stop_with_starter() -> None:
    """Let the system ask this process to stop when the one that started it ends, even by SIGKILL; on Linux alone."""
    if sys.platform == "linux":
        starter = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != starter:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)
