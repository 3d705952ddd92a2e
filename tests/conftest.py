"""Before torch is imported: tests run side by side, and so do the processes that they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
