# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention on a CPU with prompts computed here, as classes that vLLM finds by their path."""

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from xgdn.integrations.vllm_attention import PromptAttention

__all__ = ["XgdnAttention", "XgdnAttentionBackend"]


class XgdnAttention(PromptAttention, CPUAttentionBackendImpl):  # type: ignore[misc]  # vLLM is not installed
    pass


class XgdnAttentionBackend(CPUAttentionBackend):  # type: ignore[misc]
    @staticmethod
    def get_impl_cls() -> type[XgdnAttention]:
        return XgdnAttention
