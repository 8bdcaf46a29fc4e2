# SPDX-License-Identifier: Apache-2.0
"""Hosts that run these models with engines of their own, served by the kernels here; see docs/integrations.md."""

from xgdn.integrations.calls import FunctionReport, Report, report
from xgdn.integrations.kernels_package import kernel_mapping
from xgdn.integrations.transformers_patch import patch_transformers, unpatch_transformers

__all__ = ["FunctionReport", "Report", "kernel_mapping", "patch_transformers", "report", "unpatch_transformers"]
