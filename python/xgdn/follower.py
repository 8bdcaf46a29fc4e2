# SPDX-License-Identifier: Apache-2.0
"""`python -m xgdn.follower`: a rank that an engine has started, with its invitation on stdin.

It ends with its engine: with status 0 when that ends in order, otherwise with 1 and a line on stderr.
"""

import os
import pickle
import sys
import threading
import time

from xgdn.tensor_parallel import Invitation, follow_invitation

_GRACE_SECONDS = 3.0  # for a rank that is about to end in order


def _end_with_rank_0() -> None:
    """End this process when the pipe from rank 0 is closed, whatever it waits for."""
    while os.read(0, 4096):
        pass
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    """Follow until the engine ends."""
    unbuffered = os.fdopen(os.dup(0), "rb", buffering=0)
    invitation: Invitation = pickle.load(unbuffered)
    threading.Thread(target=_end_with_rank_0, name="xgdn-rank-0", daemon=True).start()
    status = 0
    try:
        follow_invitation(invitation)
    except Exception as error:
        print(f"xgdn: rank {invitation.rank}: {error}", file=sys.stderr, flush=True)
        status = 1
    os._exit(status)  # what waits for a rank that has ended, such as a device's queue, must not keep this one


if __name__ == "__main__":
    main()
