# SPDX-License-Identifier: Apache-2.0
"""Cases of the op tests, their inputs, and what "equal" means."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import reference
import xgdn
from xgdn import ops

# Every op's function.
OPS: dict[str, Callable[..., Any]] = {
    name: getattr(ops, name)
    for name in (
        "recurrent_gated_delta_rule",
        "chunk_gated_delta_rule",
        "replay_gated_delta_rule",
        "materialize_state",
        "packed_decode",
        "causal_conv1d",
        "causal_conv1d_update",
        "gdn_gating",
        "l2_norm",
        "rms_norm_gated",
        "rms_norm",
        "sigmoid_and_mul",
        "silu_and_mul",
        "linear",
        "rms_norm_linear",
        "quantized_linear",
        "gdn_decode_step",
        "paged_attention",
        "store_kv",
        "copy_slots",
        "moe_experts",
        "quantized_moe_experts",
    )
}

_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Log decays. Real checkpoints reach -316; -1e4 underflows exp() in every format.
GATES = {
    "typical": (-0.5, 0.0),
    "near0": (-1e-6, 0.0),
    "slow": (-1e-2, 0.0),
    "halfulp": (-3e-8, -3e-8),  # exp() rounds it by half a unit of f32, to the same side at every step
    "g5": (-5.0, -5.0),
    "g380": (-380.0, -380.0),
    "g1e4": (-1e4, -1e4),
    "mixed": (-380.0, 0.0),
}

# How alike the keys of a sequence are: a common key, and the share of each token's own in it.
KEYS = {"random": None, "same": 0.0, "near1%": 0.01, "near3%": 0.03, "near10%": 0.1, "near30%": 0.3}
KEY_GEOMETRIES = (*KEYS, "alternating", "rank8")  # alternating: in sign, near3% else; rank8: of 8 directions


def make_keys(geometry: str, T: int, H: int, K: int, gen: torch.Generator) -> Tensor:
    own = torch.randn((T, H, K), generator=gen)
    if geometry == "rank8":
        return torch.einsum("thr,rhk->thk", own[..., :8], torch.randn((8, H, K), generator=gen))
    share = KEYS["near3%" if geometry == "alternating" else geometry]
    if share is None:
        return own
    k = own[:1] + share * own
    return k * (1 - 2 * (torch.arange(T) % 2))[:, None, None] if geometry == "alternating" else k


@dataclass(frozen=True)
class Case:
    """A batch of sequences and how its inputs are made. `str(case)` is the test's id."""

    lengths: tuple[int, ...]
    H: int = 1
    HV: int = 2
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None  # None: dtype
    beta_dtype: torch.dtype = torch.float32
    gates: str = "typical"
    beta: float | None = None  # None: uniform in (0, 1)
    keys: str = "random"  # one of KEY_GEOMETRIES
    key_size: float = 1.0  # of a component of q and k; where it is small the norm's eps counts
    initial: str = "some"  # all | none | some: which sequences start from their slot (prefill)
    strided: bool = False  # inputs are views of one packed projection, a state slot is a view of a wider one
    padded: tuple[int, ...] = ()  # sequences with a padding slot; their input rows are NaN
    writes_elsewhere: bool = False  # write_indices name other slots than state_indices
    use_qk_l2norm: bool = True
    scale: float | None = None

    def __str__(self) -> str:
        same = len(self.lengths) > 4 and len(set(self.lengths)) == 1
        lengths = f"{len(self.lengths)}x{self.lengths[0]}" if same else "+".join(map(str, self.lengths)) or "empty"
        parts = [lengths, f"H{self.H}", f"HV{self.HV}", f"K{self.K}", f"V{self.V}", _SHORT[self.dtype]]
        parts += [f"state_{_SHORT[self.state_dtype]}"] if self.state_dtype != torch.float32 else []
        parts += [f"out_{_SHORT[self.out_dtype]}"] if self.out_dtype is not None else []
        parts += [f"beta_{_SHORT[self.beta_dtype]}"] if self.beta_dtype != torch.float32 else []
        parts += [self.gates] if self.gates != "typical" else []
        parts += [f"beta{self.beta:g}"] if self.beta is not None else []
        parts += [f"keys_{self.keys}"] if self.keys != "random" else []
        parts += [f"keysize{self.key_size:g}"] if self.key_size != 1 else []
        parts += [f"init_{self.initial}"] if self.initial != "some" else []
        parts += ["strided"] if self.strided else []
        parts += ["pad" + "_".join(map(str, self.padded))] if self.padded else []
        parts += ["write_elsewhere"] if self.writes_elsewhere else []
        parts += ["nonorm"] if not self.use_qk_l2norm else []
        parts += [f"scale{self.scale:g}"] if self.scale is not None else []
        return "-".join(parts)

    def __repr__(self) -> str:
        return str(self)

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def N(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> list[slice]:
        """The packed rows of each sequence."""
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    @property
    def result_dtype(self) -> torch.dtype:
        return self.dtype if self.out_dtype is None else self.out_dtype

    @property
    def is_extreme(self) -> bool:
        return self.keys != "random" or GATES[self.gates][0] < -100


RAGGED = (0, 1, 63, 0, 64, 65, 0, 2)

# Lengths around the chunk size of 64, then every other property by itself on a ragged batch. Kept narrow (few heads,
# K = V = 64) so that the float64 loops stay quick; width has its own cases.
SHAPE_CASES = [
    *(Case((T,)) for T in (1, 2, 63, 64, 65, 127, 128, 129, 447, 512, 640)),
    Case((1920,), HV=1, K=32, V=32),
    Case((300, 0, 129, 1), HV=2),
    Case(RAGGED, H=2, HV=4),
    Case((1,) * 7),
    *(Case((67, 3), H=H, HV=H * ratio, K=32, V=16) for H, ratio in ((2, 1), (2, 2), (2, 3), (1, 4), (1, 8), (3, 4))),
    *(Case((70,), HV=1, K=K, V=V) for K, V in ((16, 16), (48, 64), (64, 96), (96, 48), (128, 128), (128, 64))),
    *(Case((65,), HV=1, K=K, V=V) for K, V in ((256, 128), (64, 256), (256, 256), (112, 144))),
    *(Case((130, 5), dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
    Case((130, 5), dtype=torch.bfloat16, K=128, V=128),
    Case((130, 5), state_dtype=torch.bfloat16),
    Case((130, 5), dtype=torch.bfloat16, state_dtype=torch.bfloat16),
    Case((70,), dtype=torch.bfloat16, out_dtype=torch.float32),
    Case((70,), dtype=torch.bfloat16, beta_dtype=torch.bfloat16),
    *(Case((130, 65), gates=gates) for gates in GATES if gates != "typical"),
    *(Case((130, 65), gates=gates, dtype=torch.bfloat16) for gates in ("g380", "mixed")),
    Case((130,), beta=0.0),
    Case((130,), beta=1.0),
    Case((130,), keys="same"),
    Case((130,), keys="same", beta=1.0, gates="near0"),
    *(Case((70,), key_size=size) for size in (1e-3, 0.0)),
    Case((70, 65), use_qk_l2norm=False),
    Case((70,), scale=0.3),
    Case((66, 0, 65, 1), initial="all"),
    Case((66, 0, 65, 1), initial="none"),
    Case((66, 1, 65), H=2, HV=4, K=48, V=64, strided=True),
    Case((66, 1, 65), H=2, HV=4, dtype=torch.bfloat16, strided=True),
    Case((66, 1, 65, 0, 3), padded=(1, 2)),
    Case((3, 2), padded=(0, 1)),
    Case((66, 0, 65, 1), writes_elsewhere=True),
    Case((66, 0, 65, 1), writes_elsewhere=True, padded=(2,), dtype=torch.bfloat16, state_dtype=torch.bfloat16),
]

DECODE_CASES = [
    Case((1,)),
    Case((1,) * 7),
    Case((1,) * 33, HV=1, K=128, V=128),
    Case((1,) * 5, H=2, HV=8),
    Case((1, 1, 0, 1)),
    Case((2, 1, 4, 0, 3)),
    *(Case((1,) * 5, H=H, HV=H * ratio, K=32, V=16) for H, ratio in ((2, 1), (2, 2), (2, 3), (1, 4), (1, 8), (3, 4))),
    *(
        Case((1, 2, 1), HV=1, K=K, V=V)
        for K, V in ((16, 16), (48, 64), (64, 96), (96, 48), (128, 128), (256, 64), (64, 256), (256, 256), (112, 144))
    ),
    *(
        Case((1, 2, 1), dtype=dtype, state_dtype=state_dtype)
        for dtype in DTYPES
        for state_dtype in (torch.float32, torch.bfloat16)
    ),
    *(Case((1, 3, 70), HV=1, K=K, V=32, state_dtype=torch.bfloat16) for K in (16, 48, 112)),
    Case((1,) * 3, dtype=torch.bfloat16, out_dtype=torch.float32),
    Case((1,) * 3, dtype=torch.bfloat16, beta_dtype=torch.bfloat16),
    *(Case((1, 3), gates=gates) for gates in GATES if gates != "typical"),
    Case((1, 3), beta=0.0),
    Case((1, 3), beta=1.0),
    Case((40,), keys="same"),
    Case((70, 20)),
    *(Case((1, 3), key_size=size) for size in (1e-3, 0.0)),
    Case((1, 3), use_qk_l2norm=False),
    Case((1, 3), scale=0.3),
    Case((1,) * 5, H=2, HV=4, K=48, strided=True),
    Case((1, 2, 1), H=2, HV=4, dtype=torch.bfloat16, strided=True),
    Case((1,) * 6, padded=(0, 3, 5)),
    Case((2, 3), padded=(0, 1)),
    Case((1,) * 4, writes_elsewhere=True),
    Case((1, 0, 2, 1), writes_elsewhere=True, padded=(2,), dtype=torch.bfloat16, state_dtype=torch.bfloat16),
]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value of each axis, in which any two values of two axes meet; all combinations would be many times as
    many. An axis may itself be a product, of what must meet in threes.
    """
    places = [(i, a) for i, axis in enumerate(axes) for a in range(len(axis))]
    left = {(one, other) for one, other in itertools.combinations(places, 2) if one[0] != other[0]}
    rows: list[tuple[Any, ...]] = []
    while left:
        row = dict(min(left))
        for i, axis in enumerate(axes):
            if i not in row:
                # Where several are as good, the one whose turn it is.
                turn = [(len(rows) + a) % len(axis) for a in range(len(axis))]
                row[i] = max(turn, key=lambda a: sum(tuple(sorted([(i, a), had])) in left for had in row.items()))
        left -= set(itertools.combinations(sorted(row.items()), 2))
        rows.append(tuple(axis[row[i]] for i, axis in enumerate(axes)))
    return rows


def backends_for_cpu_tensors() -> list[str]:
    """Backends of this build that serve every op on CPU tensors, in order of preference."""
    unable = {row.backend for row in xgdn.doctor() if row.why_not is not None}
    return [name for name in xgdn.available_backends() if name not in unable]


class Matrix:
    """A matrix inside wider memory: `gap` more columns, one more row at either end."""

    def __init__(self, values: Tensor, gap: int, around: float = torch.nan) -> None:
        rows, columns = values.shape
        self.gap, self.columns = gap, columns
        self.memory = torch.full((rows + 2, columns + gap), around, dtype=values.dtype)
        self.within(self.memory).copy_(values)

    def within(self, memory: Tensor) -> Tensor:
        return memory[1:-1, self.gap // 2 : self.gap // 2 + self.columns]

    @property
    def values(self) -> Tensor:
        return self.within(self.memory)


@dataclass
class Inputs:
    """Tensors of a delta-rule call. The pool has slots that nobody names; they and `out` are NaN."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    cu_seqlens: Tensor
    state_indices: Tensor
    write_indices: Tensor | None
    has_initial_state: Tensor
    out: Tensor
    before: Tensor = field(init=False)  # the pool's bits at the start

    def __post_init__(self) -> None:
        self.before = self.state.clone()

    @property
    def written(self) -> Tensor:
        return self.state_indices if self.write_indices is None else self.write_indices

    def shared(self) -> dict[str, object]:
        return {
            "cu_seqlens": self.cu_seqlens,
            "state_indices": self.state_indices,
            "write_indices": self.write_indices,
            "out": self.out,
            "scale": self.case.scale,
            "use_qk_l2norm_in_kernel": self.case.use_qk_l2norm,
        }

    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta, self.state


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cu_seqlens_of(lengths: tuple[int, ...]) -> Tensor:
    return i32(list(itertools.accumulate(lengths, initial=0)))


def make_inputs(case: Case, seed: int = 0, *, prefill: bool) -> Inputs:
    gen = torch.Generator().manual_seed(seed)
    T, N, H, HV, K, V = case.T, case.N, case.H, case.HV, case.K, case.V

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    q, k = case.key_size * randn(T, H, K), case.key_size * make_keys(case.keys, T, H, K, gen)
    v = randn(T, HV, V)
    if not case.use_qk_l2norm:
        q, k = (reference.l2_norm(x).float() for x in (q, k))
    low, high = GATES[case.gates]
    g = low + (high - low) * torch.rand((T, HV), generator=gen)
    if case.gates == "mixed":  # most tokens keep the state, some wipe it
        g = torch.where(torch.rand((T, HV), generator=gen) < 0.9, -0.1 * torch.rand((T, HV), generator=gen), g)
    beta = torch.rand((T, HV), generator=gen) if case.beta is None else torch.full((T, HV), case.beta)
    q, k, v, beta = q.to(case.dtype), k.to(case.dtype), v.to(case.dtype), beta.to(case.beta_dtype)
    for n in case.padded:
        for x in (q, k, v, g, beta):
            x[case.rows[n]] = torch.nan

    # Slots in an order of their own, with NaN slots between and around them.
    num_slots = 3 * N + 2
    order = torch.randperm(num_slots, generator=gen)[: 2 * N].int()
    read, write = order[:N].clone(), order[N:].clone()
    state = torch.full((num_slots, HV, V, K), torch.nan, dtype=case.state_dtype)
    starts = {"all": [True] * N, "none": [False] * N, "some": [n % 2 == 0 for n in range(N)]}[case.initial]
    for n in range(N):
        if starts[n] or not prefill:
            state[read[n]] = randn(HV, V, K).to(case.state_dtype)
    for n in case.padded:
        read[n] = xgdn.PAD_SLOT_ID
    out = torch.full((T, HV, V), torch.nan, dtype=case.result_dtype)
    inputs = Inputs(
        case,
        q,
        k,
        v,
        g,
        beta,
        state,
        cu_seqlens_of(case.lengths),
        read,
        write if case.writes_elsewhere else None,
        torch.tensor(starts, dtype=torch.bool),
        out,
    )
    return _strided(inputs) if case.strided else inputs


def _strided(x: Inputs) -> Inputs:
    """The values as views: q, k, v of one packed projection, g and beta of another; out and slots of wider ones."""
    case = x.case
    packed = torch.cat([x.q.flatten(1), x.k.flatten(1), x.v.flatten(1), torch.full((case.T, 24), torch.nan)], 1)
    packed = packed.to(case.dtype)
    widths = [case.H * case.K, case.H * case.K, case.HV * case.V]
    q, k, v, _ = packed.split([*widths, 24], 1)
    gates = torch.stack([x.g, x.beta.float()], 1)
    pool = torch.full((x.state.shape[0], 2, *x.state.shape[1:]), torch.nan, dtype=case.state_dtype)
    pool[:, 1] = x.state
    out = torch.full((case.T, 3, case.HV, case.V), torch.nan, dtype=case.result_dtype)
    return replace(
        x,
        q=q.unflatten(1, (case.H, case.K)),
        k=k.unflatten(1, (case.H, case.K)),
        v=v.unflatten(1, (case.HV, case.V)),
        g=gates[:, 0],
        beta=gates[:, 1],
        state=pool[:, 1],
        out=out[:, 1],
    )


# Of the inputs that have come, by their bits: each backend and mode asks for the same. One truth is small.
_TRUTHS: dict[bytes, tuple[Tensor, dict[int, Tensor]]] = {}


def expected(x: Inputs, *, prefill: bool) -> tuple[Tensor, dict[int, Tensor]]:
    """Truth in float64: the outputs, and the state of every written slot. Not to be changed."""
    given = hashlib.blake2b(repr((x.case, prefill)).encode())
    for t in (x.q, x.k, x.v, x.g, x.beta, x.before, x.cu_seqlens, x.state_indices, x.written, x.has_initial_state):
        given.update(t.contiguous().flatten().view(torch.uint8).numpy())
    key = given.digest()
    if key not in _TRUTHS:
        _TRUTHS[key] = _truth(x, prefill=prefill)
    return _TRUTHS[key]


def _truth(x: Inputs, *, prefill: bool) -> tuple[Tensor, dict[int, Tensor]]:
    case = x.case
    out = torch.zeros((case.T, case.HV, case.V), dtype=torch.float64)
    slots: dict[int, Tensor] = {}
    for n, rows in enumerate(case.rows):
        if x.state_indices[n] == xgdn.PAD_SLOT_ID:
            continue
        initial = x.before[x.state_indices[n]].double()
        if prefill and not x.has_initial_state[n]:
            initial = torch.zeros_like(initial)
        tokens = (t[rows] for t in (x.q, x.k, x.v, x.g, x.beta))
        out[rows], (slots[int(x.written[n])],) = reference.gated_delta_rule(
            *tokens, initial, case.scale, case.use_qk_l2norm, every_state=False
        )
    return out, slots


# ---- what "equal" means ---------------------------------------------------------------------------------------------

# Relative error in the 2-norm against float64 truth computed from the same (already rounded) inputs.
#   f32:  products and sums of up to 256 terms in f32, errors of up to 2,000 steps partly cancelling
#   f32 extreme: gates below -100 or equal keys; the chunk's triangular system is then at its worst conditioned
#   bf16: 8 significant bits, so rounding a result once costs up to 2^-9 = 2.0e-3, 1.1e-3 to 1.7e-3 in the 2-norm; the
#         inner products of a chunk may be rounded to it as well
#   f16:  11 significant bits: an eighth of that
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
_TOLERANCE_EXTREME = 1e-5


def tolerance(case: Case, result: torch.dtype) -> float:
    """Bound for a result of dtype `result`: that of the coarsest format on the way from the inputs to it."""
    worst = max(_TOLERANCE[dtype] for dtype in (case.dtype, case.state_dtype, result))
    return max(worst, _TOLERANCE_EXTREME) if case.is_extreme else worst


# A wrong head or a lost row may be a small part of the whole. Parts are held to a multiple of the bound, because their
# own norm can be small by chance (q nearly orthogonal to k); a wrong part is off by about its own size.
_PART_SLACK = 10


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    difference = float((got - want).norm())
    return 0.0 if difference == 0 else difference / max(float(want.norm()), 1e-300)


def assert_close(name: str, got: Tensor, want: Tensor, bound: float, parts: tuple[int, ...] = ()) -> None:
    """`||got - want|| <= bound * ||want||`, without NaN; and within `_PART_SLACK` for every slice along `parts`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    got, want = got.double(), want.double()
    bad = ~got.isfinite()
    assert not bad.any(), f"{name}: {int(bad.sum())} values are not finite, the first at {bad.nonzero()[0].tolist()}"
    error = relative_error(got, want)
    assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}; {_worst(got, want)}"
    for dim in parts:
        if want.numel() == 0:
            continue
        others = [d for d in range(want.dim()) if d != dim]
        size = want.square().sum(others).sqrt()
        share = float(want.norm()) / want.shape[dim] ** 0.5  # a slice's norm if all were equal
        errors = (got - want).square().sum(others).sqrt() / size.clamp(min=max(0.1 * share, 1e-300))
        i = int(errors.argmax())
        assert errors[i] <= _PART_SLACK * bound, (
            f"{name}: slice {i} of dimension {dim} has relative error {float(errors[i]):.3g} > "
            f"{_PART_SLACK * bound:.3g}; {_worst(got, want)}"
        )


def _worst(got: Tensor, want: Tensor, count: int = 3) -> str:
    difference = (got.double() - want.double()).abs()
    lines = []
    for flat in difference.flatten().argsort(descending=True)[:count]:
        at = [int(i) for i in torch.unravel_index(flat, difference.shape)]
        lines.append(f"at {at} got {got[tuple(at)].item():.7g} want {want[tuple(at)].item():.7g}")
    return "worst " + ", ".join(lines)


def assert_bits_equal(name: str, got: Tensor, want: Tensor) -> None:
    """Bitwise, so that NaN equals itself and -0 does not equal 0."""
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = got.contiguous().view(as_int) != want.contiguous().view(as_int)
    assert not differs.any(), f"{name}: bits differ first at {differs.nonzero()[0].tolist()}"


def assert_batch_invariant(op: str, name: str, got: Tensor, want: Tensor, bound: float) -> None:
    """The bits of another batch, where the last call of `op` promised them; elsewhere a library made a product, and its
    result is within `bound`."""
    if xgdn.last_is_batch_invariant(op):
        assert_bits_equal(name, got, want)
    else:
        assert_close(name, got, want, bound)


def assert_untouched(x: Inputs, slots: dict[int, Tensor]) -> None:
    """Every slot that the call did not write has the bits that it had before."""
    others = [slot for slot in range(x.state.shape[0]) if slot not in slots]
    assert_bits_equal("untouched slots", x.state[others], x.before[others])


def assert_call(x: Inputs, got: Tensor, *, prefill: bool) -> None:
    """Outputs, written slots and untouched slots of a delta-rule call."""
    case = x.case
    want, slots = expected(x, prefill=prefill)
    assert_close("out", got, want, tolerance(case, case.result_dtype), parts=(0, 1))
    for n in case.padded:
        assert not got[case.rows[n]].any(), f"out: rows of the padded sequence {n} are not zero"
    bound = tolerance(case, case.state_dtype)
    for slot, state in slots.items():
        assert_close(f"state of slot {slot}", x.state[slot], state, bound, parts=(0,))
    assert_untouched(x, slots)
