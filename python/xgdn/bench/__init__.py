# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a deployment: decode steps of a model, `xgdn bench model`; a server under load, `xgdn bench serving`.

The second needs the extra `xgdn[bench]`.
"""
