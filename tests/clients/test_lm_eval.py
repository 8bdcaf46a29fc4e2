# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness, by its `local-completions`: the log likelihoods of transformers.

The data are pieces of a text that the small model was not trained on.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from live_server import CHECKPOINT, TOKENIZER
from served import KEY, ROOT, Reference, Server

TASKS = ROOT / "tests/clients/lm_eval"
MAX_LENGTH = 200  # tokens of a context, so that passages take several
TOLERANCE = 1e-4  # absolute, of the log likelihood of a continuation or of a whole passage
STOPS = ["\n\n", "\nclass ", "\ndef ", "\n#", "\nif "]  # of lm_eval/xgdn_answers.yaml
Score = tuple[float, bool]

HERE = {"tokenizer": str(CHECKPOINT), "tokenizer_backend": "huggingface"}
# Ways to send the same requests: arguments of its model, options of its command.
MODES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tokens": (HERE, []),
    "batches": (HERE, ["--batch_size", "7"]),
    "texts": (HERE | {"tokenized_requests": False}, []),
    "at once": (HERE | {"num_concurrent": 8}, []),
    "remote tokenizer": ({"tokenizer_backend": "auto", "auth_token": KEY, "num_concurrent": 8}, []),
}


def pieces(count: int, seed: int) -> list[dict[str, Any]]:
    """Contexts, each with its continuation first and two of others after it. They begin and end anywhere."""
    text = (CHECKPOINT / "held_out.txt").read_text()
    draw = random.Random(seed)

    def piece(length: int) -> tuple[int, str]:
        begin = draw.randrange(len(text) - 1000)
        return begin + length, text[begin : begin + length]

    rows = []
    for _ in range(count):
        end, context = piece(draw.randint(1, 300))
        choices = [text[end : end + draw.randint(1, 60)], piece(draw.randint(1, 60))[1], piece(20)[1]]
        rows.append({"context": context, "choices": choices})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> dict[str, list[dict[str, Any]]]:
    rows = pieces(30, seed=0)
    for row in rows[:10]:
        row["choices"].append(reference.want(row["context"].rstrip() or "a", 6))
    # After its main function a program ends: the token that the harness has generated, and drops, is the end of a text.
    rows.append({"context": "if __name__ == '__main__':\n", "choices": ["    main()\n", "    pass\n"]})
    rows.append({"context": "größe = '日本", "choices": ["語'", "'", " é 🙂"]})
    text = (CHECKPOINT / "held_out.txt").read_text()
    passages = [{"text": text[begin : begin + length]} for begin, length in ((0, 2500), (20_000, 1200), (50_000, 30))]
    answers = [{"text": row["context"]} for row in rows[:16]]
    return {"choices": rows, "passages": passages, "answers": answers}


Evaluate = Callable[..., dict[str, list[Any]]]


@pytest.fixture(scope="module")
def evaluate(
    environments: Path, server: Server, data: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Evaluate:
    """Runs the harness; returns each task's answers of the model in the order of the data."""
    folder = tmp_path_factory.mktemp("lm_eval")
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(tasks: Sequence[str], arguments: dict[str, Any], options: Sequence[str] = ()) -> dict[str, list[Any]]:
        out = folder / f"{len(list(folder.iterdir()))}"
        model = {"model": "tiny", "base_url": f"{server.url}/completions", "max_length": MAX_LENGTH} | arguments
        command = [str(environments / "lm_eval/bin/lm_eval"), "run", "--model", "local-completions"]
        command += ["--model_args", json.dumps(model), "--tasks", *tasks, "--include_path", str(TASKS)]
        command += ["--output_path", str(out), "--log_samples", *options]
        offline = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment = os.environ | offline | {"OPENAI_API_KEY": KEY}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return {task: samples(next(out.glob(f"**/samples_{task}_*.jsonl"))) for task in tasks}

    return run


def samples(path: Path) -> list[Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]


class Transformers:
    """Log likelihoods by transformers, in float32, one text at a time."""

    def __init__(self) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Score:
        """The log likelihood of the continuation's tokens, and whether each is the likeliest."""
        logits = self._model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        tokens = torch.tensor(continuation)
        chosen = logprobs[torch.arange(len(tokens)), tokens]
        return chosen.sum().item(), bool((logprobs.argmax(-1) == tokens).all())

    def choice(self, context: str, continuation: str) -> Score:
        """As the harness asks: the space before a continuation belongs to it, and no token spans the border."""
        space = len(context) - len(context.rstrip())
        if space:
            context, continuation = context[:-space], context[-space:] + continuation
        whole = TOKENIZER.encode(context + continuation).ids
        start = TOKENIZER.encode(context).ids
        return self.score(start, whole[len(start) :])

    def passage(self, text: str) -> float:
        """In windows that each predict what the one before has not, from one token of context or, at the end, more."""
        ids = [0, *TOKENIZER.encode(text).ids]  # the end of a text stands before its beginning
        size = MAX_LENGTH - 2
        total = 0.0
        for begin in range(1, len(ids), size):
            end = min(begin + size, len(ids))
            total += self.score(ids[max(end - size - 1, 0) : begin], ids[begin:end])[0]
        return total


@pytest.fixture(scope="module")
def judge() -> Transformers:
    return Transformers()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_log_likelihoods_of_choices_are_those_of_transformers(
    evaluate: Evaluate, data: dict[str, list[dict[str, Any]]], judge: Transformers, mode: str
) -> None:
    results = evaluate(["xgdn_choices"], *MODES[mode])["xgdn_choices"]
    num_greedy = 0
    for row, answers in zip(data["choices"], results, strict=True):
        for choice, (logprob, is_greedy) in zip(row["choices"], answers, strict=True):  # both written as text
            wanted, wanted_greedy = judge.choice(row["context"], choice)
            assert float(logprob) == pytest.approx(wanted, abs=TOLERANCE), (row, choice)
            assert is_greedy == str(wanted_greedy), (row, choice)
            num_greedy += wanted_greedy
    assert num_greedy >= 5


# Not as texts: a window is cut between tokens, and the text of its tokens may have others.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"texts"}))
def test_log_likelihoods_of_passages_are_those_of_transformers(
    evaluate: Evaluate, data: dict[str, list[dict[str, Any]]], judge: Transformers, mode: str
) -> None:
    results = evaluate(["xgdn_passages"], *MODES[mode])["xgdn_passages"]
    for row, (logprob,) in zip(data["passages"], results, strict=True):
        assert float(logprob) == pytest.approx(judge.passage(row["text"]), abs=TOLERANCE)


@pytest.mark.timeout(600)
def test_answers_end_at_the_stop_strings(
    evaluate: Evaluate, data: dict[str, list[dict[str, Any]]], reference: Reference
) -> None:
    """Five stop strings of the task, and the name of the end of a text, which the harness adds."""
    answers = evaluate(["xgdn_answers"], HERE | {"num_concurrent": 8})["xgdn_answers"]
    ended = 0
    for row, (answer,) in zip(data["answers"], answers, strict=True):
        text = reference.want(row["text"], 24)
        stops = [place for place in map(text.find, STOPS) if place >= 0]
        assert answer == text[: min(stops, default=len(text))]
        ended += bool(stops)
    assert 0 < ended < len(answers)
