# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of kernels and of a layer; run by benchmarks/bench.py.

A `Case` holds inputs, the float64 truth and a roofline; a `Provider` computes it. Every provider is checked against the
truth before its time counts, and providers take turns, call by call, so that noise meets all of them.
"""
