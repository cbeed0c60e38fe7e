"""These tests run by Triton's interpreter, in a process that test_kernels.py starts with TRITON_INTERPRET=1."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
