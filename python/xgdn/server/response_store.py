# SPDX-License-Identifier: Apache-2.0
"""Responses that clients may name later, in memory."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xgdn.server.api_error import ApiError

_MAX_CHARACTERS = 64 * 2**20  # of all conversations and documents


@dataclass(frozen=True)
class StoredResponse:
    document: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]  # of the conversation so far, without instructions
    size: int  # in characters


class ResponseStore:
    """Keeps the responses that were used last, each for the client that got it. Any thread may call it."""

    def __init__(self, max_responses: int) -> None:
        self._max_responses = max_responses
        self._responses: OrderedDict[tuple[str | None, str], StoredResponse] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def put(self, client: str | None, response: StoredResponse) -> None:
        with self._lock:
            self._responses[client, response.document["id"]] = response
            self._size += response.size
            while self._responses and (len(self._responses) > self._max_responses or self._size > _MAX_CHARACTERS):
                self._size -= self._responses.popitem(last=False)[1].size

    def get(self, client: str | None, response_id: str) -> StoredResponse | None:
        with self._lock:
            if (client, response_id) in self._responses:
                self._responses.move_to_end((client, response_id))
            return self._responses.get((client, response_id))

    def find(self, client: str | None, response_id: str) -> StoredResponse:
        """Return a response; raises ApiError when there is none, or none any more."""
        response = self.get(client, response_id)
        if response is None:
            raise _not_found(response_id)
        return response

    def delete(self, client: str | None, response_id: str) -> None:
        """Forget a response; raises ApiError when there is none."""
        with self._lock:
            response = self._responses.pop((client, response_id), None)
            self._size -= 0 if response is None else response.size
        if response is None:
            raise _not_found(response_id)


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, "response_not_found", f"There is no response '{response_id}', or no longer.")
