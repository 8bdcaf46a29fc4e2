# SPDX-License-Identifier: Apache-2.0
"""Layers for the package `kernels`, computed by the installed xgdn; see docs/integrations.md."""

from . import layers

__all__ = ["layers"]
