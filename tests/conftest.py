import os

# Before anything imports triton: its kernels decide at import whether they are interpreted.
if os.environ.get("WARPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch loads: workers share the cores, and threads that wait would starve those that work.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("warpo", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("warpo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the last of them leaves no worker idle. Last the one that
    times kernels in Triton's interpreter, beside which vLLM does not start.
    """
    minutes: Counter[Path] = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        minutes[item.path] += slow.kwargs.get("minutes", 0) if slow else 0
    items.sort(key=lambda item: (item.path.name == "test_gpu.py", -minutes[item.path]))
