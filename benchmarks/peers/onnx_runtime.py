# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's LinearAttention on its CPU execution provider: f32, out of place, states [N, HV, K, V], q and k
normalised beforehand. Its threads do not spin, which would take time from the provider whose turn is next."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from kernels.cases import HV, DecodeCase, H, PrefillCase, VerifyCase
from kernels.compare import Provider
from peers import OUT_TOLERANCE, STATE_TOLERANCE

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


def _inputs(case: DecodeCase | PrefillCase, batch: int) -> dict[str, Tensor]:
    normalised = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (case.q, case.k))
    q, k = normalised
    tensors = {"q": q, "k": k, "v": case.v, "g": case.gates.g, "beta": case.gates.beta}
    return {name: _rows(x, batch) for name, x in tensors.items()}


def decode(case: DecodeCase) -> list[Provider]:
    if case.pool.dtype != torch.float32:
        return []
    pool = case.pool.make().transpose(2, 3).contiguous()
    session = _Session(case.q.shape[-1] ** -0.5)
    inputs = _inputs(case, case.batch)
    outputs = {"out": torch.empty_like(inputs["v"]), "new_state": torch.empty_like(pool[: case.batch])}

    def call(i: int) -> None:
        slots = case.pool.slots(i)
        session.run({**inputs, "state": pool[slots[0] : slots[-1] + 1]}, outputs)

    def result() -> tuple[Tensor, Tensor]:
        return outputs["out"].view(case.v.shape), outputs["new_state"].transpose(2, 3)

    return [Provider(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(_: VerifyCase) -> list[Provider]:
    return []


def prefill(case: PrefillCase) -> list[Provider]:
    if len(case.lengths) > 1:
        return []
    session = _Session(case.q.shape[-1] ** -0.5)
    inputs = _inputs(case, 1) | {"state": torch.zeros_like(case.make_pool())}
    outputs = {"out": torch.empty_like(inputs["v"]), "new_state": torch.empty_like(inputs["state"])}

    def result() -> tuple[Tensor, Tensor]:
        return outputs["out"].view(case.v.shape), outputs["new_state"].transpose(2, 3)

    return [Provider(NAME, lambda _: session.run(inputs, outputs), result, OUT_TOLERANCE, STATE_TOLERANCE)]
