# SPDX-License-Identifier: Apache-2.0
"""Versions that go together."""

from importlib.metadata import version

RAY = "2.60"  # tested; the router's interface is Ray's to change


def check_ray(found: str) -> None:
    """Raise RuntimeError for a Ray that the example was not tested with."""
    if found.split(".")[:2] != RAY.split("."):
        raise RuntimeError(f"ray: expected version {RAY}, got {found}")


def xgdn_version() -> str:
    return version("xgdn")


def check_xgdn(expected: str) -> None:
    """Raise RuntimeError where this process has another xgdn than the one that deploys."""
    if (found := xgdn_version()) != expected:
        raise RuntimeError(f"xgdn: expected version {expected}, as where the application was deployed, got {found}")
