# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve`: the engine behind OpenAI's HTTP interface. Needs the extra `xgdn[serve]`."""
