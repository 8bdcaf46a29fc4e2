# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels and models.

A module of kernels has `load(folder)`, which returns what it loaded, and `decode`, `verify` and `prefill`, which return
providers for a case (none where the peer has no such op). Their tolerances are wide: what a peer's rounding costs is
shown in the table, a wrong result is not. The modules `model_*` drive whole models, each in a process of its own.
"""

OUT_TOLERANCE = 2e-2
STATE_TOLERANCE = 2e-2
