# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's LinearAttention on its CPU provider: f32, out of place, states [N, HV, K, V], q and k normalised
beforehand. Its threads do not spin, which would take time from the contestant whose turn is next."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from peers import OUT_TOLERANCE, STATE_TOLERANCE
from xgdn.bench import Contestant, DecodeProblem, PrefillProblem, VerifyProblem
from xgdn.bench.problems import HV, H

REQUIREMENT = "onnxruntime==1.31.1 onnx==1.23.2 ml_dtypes protobuf flatbuffers"
NAME = "ONNX Runtime 1.31.1"


def load(folder: Path) -> str:
    sys.path.append(str(folder))
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


class _Session:
    """One LinearAttention node, bound to the tensors that it reads and writes."""

    def __init__(self, scale: float) -> None:
        import onnxruntime
        from onnx import TensorProto, helper

        node = helper.make_node(
            "LinearAttention",
            ["q", "k", "v", "state", "g", "beta"],
            ["out", "new_state"],
            domain="com.microsoft",
            q_num_heads=H,
            kv_num_heads=HV,
            update_rule="gated_delta",
            scale=scale,
        )
        values = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*node.input, *node.output)
        }
        graph = helper.make_graph([node], "rule", [values[n] for n in node.input], [values[n] for n in node.output])
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        import numpy

        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr())
        self._session.run_with_iobinding(binding)


def _rows(x: Tensor, batch: int) -> Tensor:
    """[B, T / B, heads x dim] in f32."""
    return x.float().reshape(batch, len(x) // batch, -1).contiguous()


def _inputs(problem: DecodeProblem | PrefillProblem, batch: int) -> dict[str, Tensor]:
    normalised = (
        x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (problem.q, problem.k)
    )
    q, k = normalised
    tensors = {"q": q, "k": k, "v": problem.v, "g": problem.gates.g, "beta": problem.gates.beta}
    return {name: _rows(x, batch) for name, x in tensors.items()}


def decode(problem: DecodeProblem) -> list[Contestant]:
    if problem.pool.dtype != torch.float32:
        return []
    pool = problem.pool.make().transpose(2, 3).contiguous()
    session = _Session(problem.q.shape[-1] ** -0.5)
    inputs = _inputs(problem, problem.batch)
    outputs = {"out": torch.empty_like(inputs["v"]), "new_state": torch.empty_like(pool[: problem.batch])}

    def call(i: int) -> None:
        slots = problem.pool.slots(i)
        session.run({**inputs, "state": pool[slots[0] : slots[-1] + 1]}, outputs)

    def result() -> tuple[Tensor, Tensor]:
        return outputs["out"].view(problem.v.shape), outputs["new_state"].transpose(2, 3)

    return [Contestant(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(_: VerifyProblem) -> list[Contestant]:
    return []


def prefill(problem: PrefillProblem) -> list[Contestant]:
    if len(problem.lengths) > 1:
        return []
    session = _Session(problem.q.shape[-1] ** -0.5)
    inputs = _inputs(problem, 1) | {"state": torch.zeros_like(problem.make_pool())}
    outputs = {"out": torch.empty_like(inputs["v"]), "new_state": torch.empty_like(inputs["state"])}

    def result() -> tuple[Tensor, Tensor]:
        return outputs["out"].view(problem.v.shape), outputs["new_state"].transpose(2, 3)

    return [Contestant(NAME, lambda _: session.run(inputs, outputs), result, OUT_TOLERANCE, STATE_TOLERANCE)]
