"""A pytest plugin that patches the library which WARPO_PATCH names, before tests are collected."""

import importlib
import os


def pytest_configure() -> None:
    name = os.environ.get("WARPO_PATCH")
    if name:
        importlib.import_module(f"warpo.kernels.integrations.{name}").patch()
