# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on an NVIDIA GPU; run by benchmarks/gpu/run.sh.

ops.py and model.py are the commands. cases.py: inputs, truth and xgdn's own providers, on any device; peers.py: those
of other libraries; rooflines.py and replay.py: what needs the GPU.
"""
