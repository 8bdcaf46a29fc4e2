# SPDX-License-Identifier: Apache-2.0
"""`python -m xgdn` is the command `xgdn`."""

from xgdn.cli import app

if __name__ == "__main__":
    app()
