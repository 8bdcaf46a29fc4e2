# SPDX-License-Identifier: Apache-2.0
"""Sessions that fork, go back, are saved and loaded: their replies have the bits of a plain run over their tokens."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch

import xgdn
from checkpoints import Tiny, make
from live_server import CHECKPOINT
from test_replay_states import TINY
from xgdn import errors

SAMPLING = xgdn.SamplingParams(logprobs=0)


@pytest.fixture(scope="module", params=TINY, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny: Tiny = request.param
    return make(tiny, tmp_path_factory.mktemp("sessions"))[0]


def engine(checkpoint: Path, slots: int = 10, **options: object) -> xgdn.Engine:
    runner = xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=6000, kv_block_size=8, prefix_cache_slots=slots)
    return xgdn.Engine(checkpoint, **{"replay_states": True, "runner": runner} | options)


def reply(result: xgdn.GenerationResult) -> list[tuple[int, float]]:
    return [(token, p.chosen) for token, p in zip(result.tokens, result.logprobs, strict=True)]


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_random_sessions_have_the_bits_of_plain_runs(
    checkpoint: Path, tmp_path: Path, quantize: str | None, kv_dtype: torch.dtype | None
) -> None:
    draw = random.Random(5)
    options = {"quantize": quantize, "kv_dtype": kv_dtype}
    served, alone = engine(checkpoint, **options), engine(checkpoint, slots=0, **options)
    sessions = [xgdn.Session(served)]
    done = {"generate": 0, "fork": 0, "truncate": 0, "drop": 0, "save": 0}
    for i in range(150):
        what = draw.choices(list(done), [6, 2, 1, 1, 1])[0]
        session = draw.choice(sessions)
        done[what] += 1
        if what == "fork":
            sessions.append(session.fork())
        elif what == "truncate":
            session.truncate(draw.randint(0, len(session.tokens)))
        elif what == "drop":
            sessions.remove(session)
            sessions = sessions or [xgdn.Session(served)]
        elif what == "save":
            session.save(tmp_path / f"{i}.safetensors")
            loaded = xgdn.Session.load(draw.choice([served, served]), tmp_path / f"{i}.safetensors")
            assert loaded.tokens == session.tokens
            sessions.append(loaded)
        else:
            if len(session.tokens) > 300:
                session.truncate(draw.randint(0, 200))
            before = session.tokens
            more = [draw.randrange(128) for _ in range(draw.randint(1, 60))]
            got = session.generate(more, max_new_tokens=draw.randint(1, 20), ignore_eos=True, sampling=SAMPLING)
            (want,) = alone.generate(
                [before + more], max_new_tokens=len(got.tokens), ignore_eos=True, sampling=SAMPLING
            )
            assert reply(got) == reply(want)
            assert session.tokens == before + more + got.tokens
    assert min(done.values()) >= 8
    assert served.prefix_cache_stats.num_found > 2000
    assert served.num_free_slots == 4
    del session, loaded, sessions
    assert served.num_free_kv_blocks == 750, "sessions that are gone hold nothing"


def assert_goes_on(session: xgdn.Session, alone: xgdn.Engine, more: list[int]) -> None:
    before = session.tokens
    got = session.generate(more, max_new_tokens=18, ignore_eos=True, sampling=SAMPLING)
    (want,) = alone.generate([before + more], max_new_tokens=18, ignore_eos=True, sampling=SAMPLING)
    assert reply(got) == reply(want)


def test_a_reply_that_is_taken_back_has_the_bits_of_a_plain_run(checkpoint: Path) -> None:
    """Near its end, at and around folds, before what is held; alone and in forks that share a checkpoint."""
    served, alone = engine(checkpoint, 40), engine(checkpoint, 0)
    for length in (27, 28, 29, 36):  # with 20 of the prompt: behind, at and before a multiple of 16
        session = xgdn.Session(served)
        session.generate([length, 8] * 10, max_new_tokens=length, ignore_eos=True)
        tokens, kept = session.tokens, session.num_kept
        assert kept == len(tokens) - 1
        fold = kept // 16 * 16
        for position in (len(tokens), kept, kept - 2, fold + 1, fold, fold - 1, 21, 15):
            fork = session.fork()
            fork.truncate(position)
            held = kept if position >= kept else fold if position >= fold else 20 if position >= 20 else 0
            assert held <= fork.num_kept <= position, "other prompts may have left more"
            assert_goes_on(fork, alone, [9, 10, 11])
        assert_goes_on(session, alone, [12])


def test_a_reply_that_drafts_have_written_leaves_its_state() -> None:
    """The small model, whose text repeats itself. A ring that is full but for one row cannot take a verified token."""
    options = {"dtype": torch.bfloat16}
    served, alone = engine(CHECKPOINT, 40, draft_tokens=4, **options), engine(CHECKPOINT, 0, **options)
    num_near = 0
    for length in range(30, 46):
        session = xgdn.Session(served)
        session.generate([length, 8, 20] * 8, max_new_tokens=length, ignore_eos=True)
        tokens, kept = session.tokens, session.num_kept
        num_near += kept >= len(tokens) - 5
        for position in (len(tokens), kept, kept - 1):
            fork = session.fork()
            fork.truncate(position)
            assert_goes_on(fork, alone, [9, 10, 11])
        assert_goes_on(session, alone, [12])
    assert served.speculation_stats.num_right > 60
    assert num_near > 12


def test_a_file_is_of_its_model_and_its_kind_of_state(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "session.safetensors"
    session = xgdn.Session(engine(checkpoint))
    session.generate(range(100), max_new_tokens=4)
    session.save(file)
    with open(file, "rb") as stream:  # any reader of the format finds it complete
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    assert header["__metadata__"]["format"] == "xgdn.session"
    assert [path.name for path in tmp_path.iterdir()] == ["session.safetensors"]
    for options, words in [
        ({"quantize": "int8"}, "model"),
        ({"dtype": torch.float32}, "model"),
        ({"kv_dtype": torch.int8}, "attention.0.k"),
        ({"state_dtype": torch.bfloat16}, r"layers.0.state"),
    ]:
        with pytest.raises(errors.CheckpointError, match=words):
            xgdn.Session.load(engine(checkpoint, **options), file)
    other = xgdn.Session.load(engine(checkpoint), file)
    assert (other.tokens, other.num_kept) == (session.tokens, session.num_kept)
    assert session.num_kept == len(session.tokens) - 1


def test_what_cannot_be_is_refused(checkpoint: Path) -> None:
    with pytest.raises(errors.RequestError, match="prefix_cache_slots"):
        xgdn.Session(engine(checkpoint, slots=0))
    session = xgdn.Session(engine(checkpoint))
    with pytest.raises(errors.RequestError, match="at least one token"):
        session.generate([])
    with pytest.raises(errors.RangeError, match=r"0\.\.0 tokens, got 1"):
        session.truncate(1)
    with pytest.raises(errors.CheckpointError, match="No such file"):
        xgdn.Session.load(engine(checkpoint), "/nowhere.safetensors")
