"""Run as a script between this program and p2pd, and becomes it: ``python -I -S p2pd_launch.py PARENT_PID COMMAND...``.

A session of its own: a Ctrl-C in the terminal reaches our process but not p2pd, so that a last record can still be
sent. On Linux the kernel ends p2pd when the thread that started it ends; elsewhere p2pd ends itself within seconds
after its control connection closes. Standard library only, and little of it: this runs at every start.
"""

import os
import sys

PR_SET_PDEATHSIG = 1
SIGTERM = 15


def main(parent: int, command: list[str]) -> None:
    os.setsid()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the kernel was told
            sys.exit(1)
    os.environ["GOLOG_LOG_LEVEL"] = "error"  # p2pd writes a line for every peer that comes and goes
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
