"""One torch thread for every test and every process a test starts: threads that fight over two cores cost tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
