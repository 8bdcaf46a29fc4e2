// SPDX-License-Identifier: Apache-2.0
// What the adapter's functions read back from an Ascend device, by the ledger of the emulation. Not run on the CPU.
#include <dlfcn.h>

#include <functional>
#include <string_view>

#include "executor.h"
#include "ops_api.h"
#include "tests/xllm_adapter/device.h"

namespace xgdn::testing {
namespace {

namespace gdn = xllm::kernel::gdn;

constexpr int64_t kKeyHeads = 2, kValueHeads = 4, kHeadDim = 128, kSequences = 3,
                  kChannels = 2 * kKeyHeads * kHeadDim + kValueHeads * kHeadDim;

/// Copies to the host during a call.
int64_t copies_to_host(const std::function<void()>& call) {
  void* library = dlopen("libascendcl.so", RTLD_NOW | RTLD_NOLOAD);
  const auto reset = reinterpret_cast<void (*)()>(dlsym(library, "emulated_cann_ledger_reset"));
  const auto read = reinterpret_cast<const char* (*)()>(dlsym(library, "emulated_cann_ledger"));
  reset();
  call();
  const std::string_view ledger = read(), entry = "\"direction\": \"D2H\"";
  EXPECT_NE(ledger.find("\"op\""), ledger.npos) << "nothing reached the device";
  int64_t count = 0;
  for (size_t at = ledger.find(entry); at != ledger.npos; at = ledger.find(entry, at + 1)) ++count;
  return count;
}

at::Tensor tokens(at::IntArrayRef sizes) {
  return on_device(normal(sizes, at::kBFloat16));
}

at::Tensor keys(at::IntArrayRef sizes) {
  return on_device(unit(at::randn(sizes)).to(at::kBFloat16));
}

at::Tensor rates(at::IntArrayRef sizes) {
  return on_device(at::rand(sizes).to(at::kBFloat16));
}

TEST(NpuCopies, DecodeReadsNothingBack) {
  const at::Tensor q = keys({kSequences, kKeyHeads, kHeadDim}), v = tokens({kSequences, kValueHeads, kHeadDim}),
                   gate = rates({kSequences, kValueHeads});
  const at::Tensor heads = on_device(at::randn({kValueHeads})), g = on_device(-at::rand({kSequences, kValueHeads}));
  const at::Tensor slots = on_device(i32({4, 0, 2})), starts = on_device(i32({0, 1, 2, 3}));
  const at::Tensor mixed = tokens({kSequences, kChannels}), conv_state = tokens({5, 3, kChannels});
  at::Tensor state = tokens({5, kValueHeads, kHeadDim, kHeadDim});
  const auto expect_none = [](const char* function, const std::function<void()>& call) {
    call();  // what is made once is there
    EXPECT_EQ(copies_to_host(call), 0) << function;
  };
  expect_none("recurrent_gated_delta_rule", [&] {
    gdn::recurrent_gated_delta_rule(q, q, v, state, gate, 1.0, on_device(i32({0, 1, 1, 1})), slots, std::nullopt, g,
                                    std::nullopt);
  });
  expect_none("fused_sigmoid_gating_delta_rule_update", [&] {
    xllm::kernel::FusedSigmoidGatingDeltaRuleUpdateParams params{.A_log = heads,
                                                                 .a = gate,
                                                                 .dt_bias = heads,
                                                                 .q = q,
                                                                 .k = q,
                                                                 .v = v,
                                                                 .b = gate,
                                                                 .initial_state_source = state,
                                                                 .initial_state_indices = slots,
                                                                 .cu_seqlens = starts};
    gdn::fused_sigmoid_gating_delta_rule_update(params);
  });
  expect_none("causal_conv1d_update", [&] {
    xllm::kernel::CausalConv1dUpdateParams params{.x = mixed,
                                                  .conv_state = conv_state,
                                                  .weight = tokens({4, kChannels}),
                                                  .conv_state_indices = slots,
                                                  .query_start_loc = starts};
    gdn::causal_conv1d_update(params);
  });
  expect_none("causal_conv1d_decode", [&] {
    gdn::executor::causal_conv1d_decode(mixed, tokens({kChannels, 4}), conv_state, slots);
  });
  expect_none("fused_recurrent_gated_delta_rule_packed_decode", [&] {
    gdn::executor::fused_recurrent_gated_delta_rule_packed_decode(mixed, gate, gate, heads, heads, state, slots, 1.0);
  });
}

TEST(NpuCopies, PrefillReadsLengthsThatTheHostLacks) {
  const at::Tensor q = keys({1, 5, kKeyHeads, kHeadDim}), v = tokens({1, 5, kValueHeads, kHeadDim}),
                   gate = rates({1, 5, kValueHeads});
  const at::Tensor g = on_device(-at::rand({1, 5, kValueHeads})), starts = on_device(i32({0, 2, 5}));
  const std::vector<int32_t> lengths{2, 3};
  xllm::kernel::MegaChunkGdnParams params{.q = q,
                                          .k = q,
                                          .v = v,
                                          .g = g,
                                          .beta = gate,
                                          .initial_state = tokens({2, kValueHeads, kHeadDim, kHeadDim}),
                                          .cu_seqlens = starts,
                                          .q_seq_lens = lengths};
  const auto call = [&] { gdn::mega_chunk_gdn(params); };
  call();
  EXPECT_EQ(copies_to_host(call), 0);
  params.q_seq_lens = {};
  EXPECT_EQ(copies_to_host(call), 1);
}

}  // namespace
}  // namespace xgdn::testing
