import os

# Before anything imports triton: its kernels decide at import whether they are interpreted.
if os.environ.get("WARPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings  # noqa: E402

settings.register_profile("warpo", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("warpo")
