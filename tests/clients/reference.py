# SPDX-License-Identifier: Apache-2.0
"""What the engine says by itself, for tests that run in environments without it.

Usage: python tests/clients/reference.py FOLDER, with tests/py on the path. Makes FOLDER the small model with a chat
template, then answers each line `[NAME, [ARGUMENT...], {OPTION: VALUE}]`, a call of one of FUNCTIONS, with its result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from live_server import TOOL_TEMPLATE, tokens_of, want, with_template

FUNCTIONS = {"want": want, "tokens_of": tokens_of}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir()
    with_template(folder, TOOL_TEMPLATE)
    for line in sys.stdin:
        name, arguments, options = json.loads(line)
        print(json.dumps(FUNCTIONS[name](*arguments, **options)), flush=True)


main()
