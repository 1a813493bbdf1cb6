"""The further trainer processes of one peer, one to a GPU: started by the first, ended with it.

They meet through a file and talk over loopback alone. If one of them ends early the first must not wait for it for
hours in the next exchange of gradients: it ends, too, and training continues from the last checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


class Fellows:
    """Processes 1 to count - 1 of a job."""

    def __init__(self, job_path: str, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paris-swarm-meeting-")
        self.meeting = Path(self._folder.name) / "meeting"
        self._ending = threading.Event()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "paris_swarm.cli.train_child", job_path, str(rank), str(self.meeting)],
                stdin=subprocess.PIPE,  # closes when we die, however we die
                stdout=subprocess.DEVNULL,  # the first alone reports
            )
            for rank in range(1, count)
        ]
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if code != 0 and not self._ending.is_set():
            sys.stderr.write(f"one of the processes that train together (pid {process.pid}) ended with code {code}\n")
            sys.stderr.flush()
            self._folder.cleanup()
            os._exit(1)

    def end(self) -> None:
        """Waits until all have ended; call it once the run is over."""
        self._ending.set()
        for process in self._processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._folder.cleanup()
