# SPDX-License-Identifier: Apache-2.0
"""Qwen3GatedDeltaNet against the modules of transformers: both layouts, all segment kinds, shards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from cases import i32
from checkpoints import MOE, SMALL, randomize
from xgdn import _C, errors

HIDDEN = SMALL["hidden_size"]


@dataclass(frozen=True)
class Layer:
    layout: str
    H: int = 2
    HV: int = 4
    K: int = 16
    V: int = 32
    W: int = 4
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.layout}-H{self.H}-HV{self.HV}-K{self.K}-V{self.V}-W{self.W}" + ("-bias" if self.bias else "")

    def sizes(self) -> dict[str, int]:
        return {
            "linear_num_key_heads": self.H,
            "linear_num_value_heads": self.HV,
            "linear_key_head_dim": self.K,
            "linear_value_head_dim": self.V,
            "linear_conv_kernel_dim": self.W,
        }

    def reference(self) -> nn.Module:
        torch.manual_seed(5)
        if self.layout == "qwen3_next":
            module = Qwen3NextGatedDeltaNet(transformers.Qwen3NextConfig(**SMALL | MOE | self.sizes()), layer_idx=0)
        else:
            module = Qwen3_5GatedDeltaNet(transformers.Qwen3_5TextConfig(**SMALL | self.sizes()), layer_idx=0)
        if self.bias:
            module.conv1d.bias = nn.Parameter(torch.zeros(module.conv_dim))
        randomize(module)
        return module.eval()

    def config(self, **options: object) -> _C.GdnConfig:
        return _C.GdnConfig(
            hidden_size=HIDDEN,
            num_k_heads=self.H,
            num_v_heads=self.HV,
            head_k_dim=self.K,
            head_v_dim=self.V,
            conv_kernel_dim=self.W,
            state_dtype=torch.float32,
            **options,
        )

    def ours(self, module: nn.Module, *, rank: int = 0, world: int = 1, **options: object) -> _C.Qwen3GatedDeltaNet:
        weights = {name: p.detach() for name, p in module.named_parameters()}
        return _C.Qwen3GatedDeltaNet(self.config(**options), weights, dtype=torch.float32, rank=rank, world=world)


LAYERS = [
    Layer("qwen3_5"),
    Layer("qwen3_next"),
    Layer("qwen3_5", H=1, HV=3, K=32, V=16, W=2, bias=True),
    Layer("qwen3_next", H=4, HV=4, W=3),
    Layer("qwen3_next", H=2, HV=16, K=16, V=16),
    Layer("qwen3_5", H=33, HV=66, K=16, V=16),  # more heads than the whole chunk metadata describes
]


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> Layer:
    return request.param


def hidden_states(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, HIDDEN, generator=generator) for length in lengths]


def truth(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The whole sequence at once."""
    with torch.no_grad():
        return module(x.unsqueeze(0))[0]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Both sides are float32. The whole is close to its rounding; a single row, whose read-out may be so small that the
    gated norm magnifies the rounding, is still far from what a wrong head or a lost row would give."""
    assert got.shape == want.shape
    assert not got.isnan().any()
    difference = got.double() - want.double()
    assert difference.norm() <= 1e-5 * want.double().norm()
    rows = difference.norm(dim=-1) / want.double().norm(dim=-1)
    assert rows.max() <= 1e-4, f"row {rows.argmax().item()}: {rows.max().item():.2e}"


class Host:
    """Pools full of NaN and a batch builder: what a runtime is to the layer."""

    def __init__(self, net: _C.Qwen3GatedDeltaNet, num_slots: int = 24) -> None:
        self.net = net
        self.state = _C.GdnState.allocate(net.state_specs(), num_slots)
        self.kinds = [spec.kind for spec in net.state_specs()]
        for pool in map(self.state.pool, self.kinds):
            pool.fill_(float("nan") if pool.is_floating_point() else 2**30)
        self.builder = _C.BatchBuilder(num_slots=num_slots, vocab_size=1)

    def step(self, pieces: list[tuple[torch.Tensor, dict[str, object]]]) -> list[torch.Tensor]:
        """Run (hidden, SequenceStep fields) pieces, which must come in the order decode, verify, prefill."""
        steps = [_C.SequenceStep(tokens=[0] * len(x), **fields) for x, fields in pieces]
        batch = self.builder.build(steps).input.gdn
        before = {kind: self.state.pool(kind).clone() for kind in self.kinds}
        out = self.net.forward(torch.cat([x for x, _ in pieces]), batch, self.state)
        others = ("write_slot", "conv_slot", "conv_write_slot")
        named = {slot for _, f in pieces for slot in [*f["state_slots"], *map(f.get, others)]}
        for kind, old in before.items():
            for slot in set(range(old.shape[0])) - named:
                assert torch.equal(old[slot].view(torch.int32), self.state.pool(kind)[slot].view(torch.int32))
        return list(out.split([len(x) for x, _ in pieces]))


def prefill(slot: int, first: bool = True, **fields: object) -> dict[str, object]:
    return {"kind": _C.SegmentKind.PREFILL, "state_slots": [slot], "has_initial_state": not first, **fields}


def decode(slot: int, **fields: object) -> dict[str, object]:
    return {"kind": _C.SegmentKind.DECODE, "state_slots": [slot], **fields}


def verify(slots: list[int], num_accepted: int) -> dict[str, object]:
    return {
        "kind": _C.SegmentKind.VERIFY,
        "state_slots": slots,
        "conv_slot": slots[0],
        "num_accepted": num_accepted,
    }


def test_ragged_prefill_equals_transformers(layer: Layer) -> None:
    module = layer.reference()
    xs = hidden_states(1, 2, 3, 63, 64, 65, 130)
    host = Host(layer.ours(module))
    for got, x in zip(host.step([(x, prefill(i)) for i, x in enumerate(xs)]), xs, strict=True):
        assert_close(got, truth(module, x))


def test_pieces_and_decode_equal_the_whole(layer: Layer) -> None:
    module = layer.reference()
    (x,) = hidden_states(140)
    want = truth(module, x)
    host = Host(layer.ours(module))
    got = [host.step([(x[:64], prefill(3))])[0], host.step([(x[64:130], prefill(3, first=False))])[0]]
    got += [host.step([(x[t : t + 1], decode(3))])[0] for t in range(130, 140)]
    assert_close(torch.cat(got), want)


def test_all_segment_kinds_in_one_call(layer: Layer) -> None:
    module = layer.reference()
    a, b, c = hidden_states(10, 12, 70)
    host = Host(layer.ours(module, max_draft_tokens=3))
    host.step([(a[:9], prefill(0)), (b[:8], prefill(1))])
    got = host.step([(a[9:], decode(0)), (b[8:], verify([1, 5, 6, 7], 1)), (c, prefill(2))])
    assert_close(got[0], truth(module, a)[9:])
    assert_close(got[1], truth(module, b)[8:])
    assert_close(got[2], truth(module, c))


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_verification_resumes_from_what_was_accepted(layer: Layer, accepted: int, drafts: int) -> None:
    """Four tokens are verified, `accepted` of them kept; then a ragged verification and a decode go on from there,
    also with fewer tokens than were accepted."""
    module = layer.reference()
    (x,) = hidden_states(30)
    wrong = torch.randn(4, HIDDEN)
    table = [0, 5, 6, 7]
    host = Host(layer.ours(module, max_draft_tokens=3))
    host.step([(x[:8], prefill(0))])
    draft = torch.cat([x[8 : 8 + accepted], wrong[accepted:]])
    host.step([(draft, verify(table, 1))])
    begin = 8 + accepted
    got = host.step([(x[begin : begin + drafts], verify(table, accepted))])[0]
    want = truth(module, x[: begin + drafts + 1])
    assert_close(got, want[begin : begin + drafts])
    last = host.step([(x[begin + drafts : begin + drafts + 1], verify(table, drafts))])[0]
    assert_close(last, want[begin + drafts :])


def test_fork_reads_one_slot_and_writes_another(layer: Layer) -> None:
    module = layer.reference()
    (x,) = hidden_states(21)
    other = torch.randn(1, HIDDEN)
    host = Host(layer.ours(module))
    host.step([(x[:20], prefill(0))])
    forked = host.step([(other, decode(0, write_slot=4, conv_slot=0))])
    assert_close(forked[0], truth(module, torch.cat([x[:20], other]))[20:])
    assert_close(host.step([(x[20:], decode(0))])[0], truth(module, x)[20:])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shards_sum_to_the_whole(world: int) -> None:
    """world = 4 and 8 exceed the two key heads, which are then replicated."""
    layer = Layer("qwen3_next", H=2, HV=8)
    module = layer.reference()
    (x,) = hidden_states(70)
    reduced: list[torch.Tensor] = []
    total = torch.zeros_like(x)
    for rank in range(world):
        host = Host(layer.ours(module, rank=rank, world=world))
        assert host.net.local_config.num_v_heads == 8 // world
        assert host.net.local_config.num_k_heads == max(1, 2 // world)
        out = torch.cat([host.step([(x[:69], prefill(0))])[0], host.step([(x[69:], decode(0))])[0]])
        reduced.append(out)
        total += out
    assert len(reduced) == world
    assert_close(total, truth(module, x))


def test_all_reduce_is_called_once_a_forward() -> None:
    layer = Layer("qwen3_5")
    module = layer.reference()
    weights = {name: p.detach() for name, p in module.named_parameters()}
    calls: list[torch.Size] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        calls.append(tensor.shape)
        tensor.mul_(2)

    (x,) = hidden_states(5)
    net = _C.Qwen3GatedDeltaNet(layer.config(), weights, dtype=torch.float32, rank=1, world=2, all_reduce=all_reduce)
    partial = Host(layer.ours(module, rank=1, world=2)).step([(x, prefill(0))])[0]
    assert_close(Host(net).step([(x, prefill(0))])[0], partial * 2)
    assert calls == [x.shape]


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (2, 2), (0, 16), (-1, 1)])
def test_impossible_shards_are_refused(rank: int, world: int) -> None:
    layer = Layer("qwen3_5", H=2, HV=4)
    with pytest.raises(errors.ShapeError, match="shard"):
        layer.ours(layer.reference(), rank=rank, world=world)


def test_missing_and_misshapen_weights_are_refused() -> None:
    layer = Layer("qwen3_5")
    weights = {name: p.detach() for name, p in layer.reference().named_parameters()}
    without = {name: w for name, w in weights.items() if name != "in_proj_a.weight"}
    with pytest.raises(errors.CheckpointError, match="in_proj_a"):
        _C.Qwen3GatedDeltaNet(layer.config(), without, dtype=torch.float32)
    weights["A_log"] = torch.zeros(5)
    with pytest.raises(errors.CheckpointError, match=r"A_log.*\[4\].*\[5\]"):
        _C.Qwen3GatedDeltaNet(layer.config(), weights, dtype=torch.float32)


def freed(t: torch.Tensor) -> torch.Tensor:
    t.untyped_storage().resize_(0)
    return t


def test_storages_that_were_freed_are_refused() -> None:
    """Weights, hidden states, pools, the host's lengths: all but an error would read where nothing is."""
    module = LAYERS[0].reference()
    host = Host(LAYERS[0].ours(module))
    expected = "expected a storage of at least .* got one of 0"
    (x,) = hidden_states(3)
    host.step([(x, prefill(0))])
    for kind, name in ((_C.StateKind.CONV, "conv_state"), (_C.StateKind.DELTA, "state")):
        broken = Host(LAYERS[0].ours(module))
        batch = broken.builder.build([_C.SequenceStep(tokens=[0], **prefill(0))]).input.gdn
        freed(broken.state.pool(kind))
        with pytest.raises(errors.ShapeError, match=rf"{name}: {expected}"):
            broken.net.forward(x[:1], batch, broken.state)
    batch = host.builder.build([_C.SequenceStep(tokens=[0] * 3, **prefill(0))]).input.gdn
    freed(batch.segments[0].state_indices)
    with pytest.raises(errors.ShapeError, match=expected):
        host.net.forward(x, batch, host.state)
    batch = host.builder.build([_C.SequenceStep(tokens=[0] * 3, **prefill(0))]).input.gdn
    with pytest.raises(errors.ShapeError, match=rf"x: {expected}"):
        host.net.forward(freed(x), batch, host.state)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    freed(weights["out_proj.weight"])
    with pytest.raises(errors.ShapeError, match=rf"out_proj.weight: {expected}"):
        _C.Qwen3GatedDeltaNet(LAYERS[0].config(), weights, dtype=torch.float32)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        (i32([0, 1, 2]).long(), errors.DtypeError, "Int, got Long"),
        (i32([0, 1, 2]).float(), errors.DtypeError, "Int, got Float"),
        (i32([[0, 1]]), errors.ShapeError, r"\[N\+1\], got \[1, 2\]"),
        (i32([]), errors.ShapeError, r"\[N\+1\], got \[0\]"),
        (i32([0, 9, 1, 9, 2])[::2], errors.ShapeError, "contiguous"),
        (i32([1, 2]), errors.RangeError, "start at 0, got 1"),
        (i32([0, 3, 2]), errors.RangeError, r"never fall \(3 before\), got 2"),
        (torch.empty(3, dtype=torch.int32, device="meta"), errors.DeviceError, "on cpu, got meta"),
        (freed(i32([0, 1, 2])), errors.ShapeError, "a storage of at least 12 bytes, .* got one of 0"),
    ],
    ids=["long", "float", "rank", "empty", "strided", "start", "falls", "meta", "freed"],
)
def test_lengths_of_a_segment_are_checked(lengths: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"\[Segment\] cu_seqlens_cpu: expected .*{words}"):
        _C.Segment(
            kind=_C.SegmentKind.DECODE, cu_seqlens_cpu=lengths, state_indices=i32([0, 1]), conv_indices=i32([0, 1])
        )
