# SPDX-License-Identifier: Apache-2.0
"""Bodies of /v1/sessions."""

import re
from typing import Annotated

from pydantic import Field

from xgdn.server.strict_body import StrictBody

_NAME = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # of a session or a file: no dot and no slash
SessionName = Annotated[str, Field(pattern=_NAME)]


def is_name(text: str) -> bool:
    return re.fullmatch(_NAME.strip("^$"), text) is not None


class CreateSessionBody(StrictBody):
    """Opens a session: an empty one, or that of a file."""

    id: SessionName | None = None  # default: one that the server makes
    file: SessionName | None = None


class ForkSessionBody(StrictBody):
    """Opens another session with the same tokens and the same state."""

    id: SessionName | None = None  # as above


class TruncateSessionBody(StrictBody):
    """Takes back the tokens behind the first ones."""

    num_tokens: int = Field(ge=0, lt=2**31)


class SaveSessionBody(StrictBody):
    """Writes a session to a file, in place of one of that name."""

    file: SessionName | None = None  # default: the session's id
