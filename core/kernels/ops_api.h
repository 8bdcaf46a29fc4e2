// SPDX-License-Identifier: Apache-2.0
// The ops of the gated delta rule: one struct and one function per op. The only header of core/kernels that other
// levels include.
//
// Letters: T tokens packed over all sequences, N sequences, S state slots, H key heads, HV value heads (HV % H == 0;
// value head h reads key head h / (HV/H)), K and V head dims, W conv width, D channels, R rows of a conv slot,
// L columns of a verification table, C chunk size (64), I and O widths.
//
//   alpha = exp(g)    u = beta (v - alpha S k)    S <- alpha S + u k^T    o = scale S q        (S: [V, K])
//
// Every op checks dtypes, shapes, devices and strides once, before it selects a backend, and throws DtypeError,
// ShapeError, DeviceError, MissingMetadataError or UnsupportedError (core/errors.h). Values inside index tensors are
// the caller's promise (check_indices() verifies them on the host). Slots that a call does not name are bitwise
// unchanged; every row of `out` is written; rows of padded sequences are zero.
//
// "strided" below: the last dimension is contiguous, all others are free. Everything else is contiguous.
//
// What an op writes has memory of its own: no element shares it with another one, nor with another tensor of the call,
// whether read or written. Where a comment says that `out` may be an input it may be that tensor, element for element.
// A storage that holds less than sizes and strides reach, as after resize_, is a ShapeError.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/errors.h"
#include "core/kernels/chunk_metadata.h"

namespace xgdn::kernel {

/// A slot index that means "no slot": the sequence's output is zero and no state is touched.
inline constexpr int32_t kPadSlot = -1;

/// A zeroed pool, in memory that suits the ops.
at::Tensor allocate_pool(at::IntArrayRef sizes, const at::TensorOptions& options);

/// Uninitialised memory that suits weights.
at::Tensor allocate_weight(at::IntArrayRef sizes, const at::TensorOptions& options);

/// Added to the squared norm under the root, as in FLA and the checkpoints.
inline constexpr double kL2NormEps = 1e-6;

/// Advances each sequence's state token by token and reads it out: decode, and (with num_accepted) draft verification.
///
/// Decode: sequence n reads slot state_indices[n] and, after its last token, writes write_indices[n].
/// Verification: state_indices is a table [N, L]; sequence n of at most L tokens reads table[n, num_accepted[n] - 1]
/// and writes table[n, t] after token t. A read slot of kPadSlot skips the sequence; a write slot of kPadSlot computes
/// the outputs and writes nothing.
struct RecurrentGatedDeltaRuleParams {
  at::Tensor q;              // [T, H, K]      f32 | bf16 | f16, strided
  at::Tensor k;              // [T, H, K]      as q, strided
  at::Tensor v;              // [T, HV, V]     as q, strided
  at::Tensor g;              // [T, HV]        f32, natural log of the decay, <= 0, strided
  at::Tensor beta;           // [T, HV]        f32 | as q, after the sigmoid, strided
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor cu_seqlens;     // [N+1]          i32
  at::Tensor state_indices;  // [N] | [N, L]   i32
  at::Tensor out;            // [T, HV, V]     f32 | as q, strided, written
  std::optional<at::Tensor> write_indices = {};   // [N]  i32; default state_indices; not with num_accepted
  std::optional<at::Tensor> num_accepted = {};    // [N]  i32, 1..L; makes the call a verification
  std::optional<at::Tensor> cu_seqlens_cpu = {};  // [N+1] i32 on the host, for backends whose kernels limit lengths
  bool may_have_padding = true;                   // false: the caller promises that no slot is kPadSlot
  std::optional<double> scale = {};               // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  std::string backend = "auto";
};
void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p);

/// Varlen prefill: initial states are read from the pool, final states written to it. Needs the step's chunk metadata
/// for C = 64 (build_chunk_metadata); never recomputes it.
struct ChunkGatedDeltaRuleParams {
  at::Tensor q;              // [T, H, K]      f32 | bf16 | f16, strided
  at::Tensor k;              // [T, H, K]      as q, strided
  at::Tensor v;              // [T, HV, V]     as q, strided
  at::Tensor g;              // [T, HV]        f32, <= 0, strided
  at::Tensor beta;           // [T, HV]        f32 | as q, strided
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor cu_seqlens;     // [N+1]          i32
  at::Tensor state_indices;  // [N]            i32
  at::Tensor chunk_indices;  // [M, 2]         i32, ChunkMetadata::chunk_indices_chunk64
  at::Tensor chunk_offsets;  // [N+1]          i32, ChunkMetadata::chunk_offsets_chunk64
  at::Tensor out;            // [T, HV, V]     f32 | as q, strided, written
  std::optional<at::Tensor> has_initial_state = {};  // [N] bool; false: start from zero; default all true
  std::optional<at::Tensor> write_indices = {};      // [N]  i32; default state_indices
  std::optional<at::Tensor> cu_seqlens_cpu = {};     // [N+1] i32 on the host, for backends whose kernels limit lengths
  bool may_have_padding = true;                      // false: the caller promises that no slot is kPadSlot
  std::optional<double> scale = {};                  // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  // "fast" may multiply sums of two bf16 numbers, with f32 sums, and rounds q and k to bf16; "exact" is f32 throughout;
  // "auto" is fast for bf16 inputs and exact for others. A backend may be more exact than asked.
  std::string accuracy = "auto";
  std::string backend = "auto";
};
void chunk_gated_delta_rule(const ChunkGatedDeltaRuleParams& p);

/// One token per sequence straight from the conv output and the raw gates: gating, l2norm and recurrence in one kernel.
/// H follows from the widths: row of mixed_qkv = [q: H K | k: H K | v: HV V].
struct PackedDecodeParams {
  at::Tensor mixed_qkv;      // [N, 2HK+HVV]   f32 | bf16 | f16, strided
  at::Tensor a;              // [N, HV]        as mixed_qkv, strided
  at::Tensor b;              // [N, HV]        as mixed_qkv, strided
  at::Tensor A_log;          // [HV]           f32 | as mixed_qkv
  at::Tensor dt_bias;        // [HV]           f32 | as mixed_qkv
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor state_indices;  // [N]            i32
  at::Tensor out;            // [N, HV, V]     f32 | as mixed_qkv, strided, written
  std::optional<at::Tensor> write_indices = {};  // [N]  i32; default state_indices
  bool may_have_padding = true;                  // false: the caller promises that no slot is kPadSlot
  std::optional<double> scale = {};              // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  std::string backend = "auto";
};
void packed_decode(const PackedDecodeParams& p);

/// Depthwise causal convolution with SiLU over packed sequences (prefill). Reads the W-1 rows before the sequence from
/// the conv pool where has_initial_state, else zeros; leaves the sequence's last W-1 inputs in rows 0..W-2.
struct CausalConv1dParams {
  at::Tensor x;                         // [T, D]     f32 | bf16 | f16, strided
  at::Tensor weight;                    // [D, W]     as x, W = 2..4, tap W-1 is the current token
  at::Tensor conv_state;                // [S, R, D]  as x | f32, R >= W-1, oldest row first, updated in place
  at::Tensor cu_seqlens;                // [N+1]      i32
  at::Tensor state_indices;             // [N]        i32
  at::Tensor out;                       // [T, D]     as x, strided, written
  std::optional<at::Tensor> bias = {};  // [D]  as x
  std::optional<at::Tensor> has_initial_state = {};  // [N]  bool; default all true
  std::optional<at::Tensor> write_indices = {};      // [N]  i32; default state_indices
  bool silu = true;
  std::string backend = "auto";
};
void causal_conv1d(const CausalConv1dParams& p);

/// The same for decode and verification. With num_accepted the history starts at row num_accepted[n] - 1; afterwards
/// the rows hold [history | inputs] without the oldest row, so that any acceptance count can be resumed. A sequence of
/// len tokens needs R >= W - 2 + len.
struct CausalConv1dUpdateParams {
  at::Tensor x;                         // [T, D]     f32 | bf16 | f16, strided
  at::Tensor weight;                    // [D, W]     as x
  at::Tensor conv_state;                // [S, R, D]  as x | f32, updated in place
  at::Tensor cu_seqlens;                // [N+1]      i32
  at::Tensor state_indices;             // [N]        i32, one slot per sequence
  at::Tensor out;                       // [T, D]     as x, strided, written
  int64_t max_len = 1;                  // tokens of the longest sequence, known to the host; R >= W - 2 + max_len
  std::optional<at::Tensor> bias = {};  // [D]  as x
  std::optional<at::Tensor> write_indices = {};  // [N]  i32; default state_indices
  std::optional<at::Tensor> num_accepted = {};   // [N]  i32, tokens accepted of the sequence's previous step
  bool may_have_padding = true;                  // false: the caller promises that no slot is kPadSlot
  bool silu = true;
  std::string backend = "auto";
};
void causal_conv1d_update(const CausalConv1dUpdateParams& p);

/// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), computed in fp32.
struct GdnGatingParams {
  at::Tensor a;        // [T, HV]  f32 | bf16 | f16, strided
  at::Tensor b;        // [T, HV]  as a, strided
  at::Tensor A_log;    // [HV]     f32 | as a
  at::Tensor dt_bias;  // [HV]     f32 | as a
  at::Tensor g;        // [T, HV]  f32, written
  at::Tensor beta;     // [T, HV]  f32, written
  std::string backend = "auto";
};
void gdn_gating(const GdnGatingParams& p);

/// out = x / sqrt(sum(x^2) + eps) over the last dimension, computed in fp32. out may be x.
struct L2NormParams {
  at::Tensor x;    // [T, H, K]  f32 | bf16 | f16, strided
  at::Tensor out;  // [T, H, K]  as x, strided, written
  double eps = kL2NormEps;
  std::string backend = "auto";
};
void l2_norm(const L2NormParams& p);

/// out = weight * (x / rms(x)) * silu(z) over the last dimension, computed in fp32, rounded once at the end. out may be
/// x or z.
struct RmsNormGatedParams {
  at::Tensor x;       // [T, HV, V]  f32 | bf16 | f16, strided
  at::Tensor z;       // [T, HV, V]  f32 | bf16 | f16, strided
  at::Tensor weight;  // [V]         f32 | as z
  at::Tensor out;     // [T, HV, V]  as z, strided, written
  double eps = 1e-6;
  std::string backend = "auto";
};
void rms_norm_gated(const RmsNormGatedParams& p);

/// out = (1 + weight) * (x / rms(x)) over the last dimension, computed in fp32, rounded once at the end (the
/// checkpoints store weight around zero). With a residual stream: residual <- residual + x first, and the sum is what
/// is normed. out may be x.
struct RmsNormParams {
  at::Tensor x;                             // [T, H, D]  f32 | bf16 | f16, strided
  at::Tensor weight;                        // [D]        f32 | as x
  at::Tensor out;                           // [T, H, D]  as x, strided, written
  std::optional<at::Tensor> residual = {};  // [T, H, D]  as x, strided, updated in place
  double eps = 1e-6;
  std::string backend = "auto";
};
void rms_norm(const RmsNormParams& p);

/// out = silu(gate) * up. out may be gate or up.
struct SiluAndMulParams {
  at::Tensor gate;  // [T, I]  f32 | bf16 | f16, strided
  at::Tensor up;    // [T, I]  as gate, strided
  at::Tensor out;   // [T, I]  as gate, strided, written
  std::string backend = "auto";
};
void silu_and_mul(const SiluAndMulParams& p);

/// out = x weight^T + bias, summed in fp32. On the cpu backend bf16 is multiplied by kernels of its own where the
/// machine has instructions for it: weights are read once, at memory speed, for as many tokens as a decode step has,
/// and a token's result has the same bits whatever tokens are beside it.
struct LinearParams {
  at::Tensor x;                         // [T, D]  f32 | bf16 | f16, strided
  at::Tensor weight;                    // [O, D]  as x, strided
  at::Tensor out;                       // [T, O]  f32 | as x, strided, written
  std::optional<at::Tensor> bias = {};  // [O]     as x
  std::string backend = "auto";
};
void linear(const LinearParams& p);

/// A layer's decode step between its two projections: causal_conv1d_update, packed_decode and rms_norm_gated, one token
/// per sequence. Row of projected = [q: H K | k: H K | v: HV V | z: HV V | b: HV | a: HV]; D = 2HK+HVV.
struct GdnDecodeStepParams {
  at::Tensor projected;      // [N, D+HVV+2HV]  f32 | bf16 | f16, strided
  at::Tensor conv_weight;    // [D, W]          as projected, W = 2..4, tap W-1 is the current token
  at::Tensor conv_state;     // [S, R, D]       as projected | f32, R >= W-1, oldest row first, updated in place
  at::Tensor A_log;          // [HV]            f32 | as projected
  at::Tensor dt_bias;        // [HV]            f32 | as projected
  at::Tensor state;          // [S, HV, V, K]   f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor norm_weight;    // [V]             f32 | as projected
  at::Tensor state_indices;  // [N]             i32
  at::Tensor out;            // [N, HV, V]      as projected, strided, written
  std::optional<at::Tensor> conv_bias = {};      // [D]    as projected
  std::optional<at::Tensor> conv_indices = {};   // [N]    i32, slots of the conv pool; default state_indices
  std::optional<at::Tensor> write_indices = {};  // [N]    i32, of both pools; default state_indices and conv_indices
  std::optional<at::Tensor> cu_seqlens = {};     // [N+1]  i32, 0, 1, ..., N; spares other backends than cpu to make it
  bool may_have_padding = true;                  // false: the caller promises that no slot is kPadSlot
  double norm_eps = 1e-6;
  std::optional<double> scale = {};  // default K^-0.5
  std::string backend = "auto";
};
void gdn_decode_step(const GdnDecodeStepParams& p);

/// One sequence of an attention call, known on the host. Its blocks are block_ids[block_begin, block_begin +
/// num_blocks).
struct AttentionSequence {
  int64_t token_begin = 0;
  int64_t num_tokens = 0;
  int64_t context_len = 0;  // tokens in the cache, these included
  int64_t block_begin = 0;
  int64_t num_blocks = 0;
};

/// Softmax attention over a paged cache: HQ query heads read HKV key heads (head h reads h / (HQ/HKV)), P blocks of B
/// rows. The last token of a sequence sees its whole context, the one before it all but one row. Rows outside the
/// sequences' contexts are never read, whatever they hold. The sequences cover the tokens 0..T-1 in order.
struct PagedAttentionParams {
  at::Tensor q;                                 // [T, HQ, D]      f32 | bf16 | f16, strided
  at::Tensor k;                                 // [P, B, HKV, D]  as q
  at::Tensor v;                                 // [P, B, HKV, D]  as q
  at::Tensor block_ids;                         // [M]             i32, the sequences' blocks, one after another
  std::vector<AttentionSequence> sequences;     // on the host
  at::Tensor out;                               // [T, HQ, D]      as q, strided, written
  std::optional<at::Tensor> context_rows = {};  // [C]  i32, block * B + offset of every row of the contexts, for
                                                // backends that read all sequences at once
  std::optional<double> scale = {};             // default D^-0.5
  std::string backend = "auto";
};
void paged_attention(const PagedAttentionParams& p);

/// E experts of I channels, each down(silu(gate(x)) * up(x)). They may lie one by one; stacked they are the same memory
/// as one tensor, for backends that multiply by all experts at once.
struct ExpertWeights {
  std::vector<at::Tensor> gate;                    // E of [I, D]
  std::vector<at::Tensor> up;                      // E of [I, D]
  std::vector<at::Tensor> down;                    // E of [D, I]
  std::optional<at::Tensor> stacked_gate_up = {};  // [E, 2I, D]
  std::optional<at::Tensor> stacked_down = {};     // [E, D, I]
};

/// Experts that are stacked already: gate_up [E, 2I, D], down [E, D, I].
ExpertWeights stacked_experts(const at::Tensor& gate_up, const at::Tensor& down);

/// out[t] = sum over the A experts that token t has chosen of weights[t, a] * expert(x[t]).
struct MoeExpertsParams {
  at::Tensor x;                  // [T, D]  f32 | bf16 | f16, strided
  at::Tensor weights;            // [T, A]  as x
  at::Tensor chosen;             // [T, A]  i64, 0..E-1
  const ExpertWeights& experts;  // as x; all alike, of the lists only the first tensor is checked
  at::Tensor out;                // [T, D]  as x, written
  std::string backend = "auto";
};
void moe_experts(const MoeExpertsParams& p);

/// recurrent_gated_delta_rule on the Ascend backend by name; throws UnsupportedError where it cannot run.
void npu_recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p);

/// Checks without running: what the functions above do first, usable on meta and fake tensors.
void check(const RecurrentGatedDeltaRuleParams& p);
void check(const ChunkGatedDeltaRuleParams& p);
void check(const PackedDecodeParams& p);
void check(const CausalConv1dParams& p);
void check(const CausalConv1dUpdateParams& p);
void check(const GdnGatingParams& p);
void check(const L2NormParams& p);
void check(const RmsNormGatedParams& p);
void check(const RmsNormParams& p);
void check(const SiluAndMulParams& p);
void check(const LinearParams& p);
void check(const GdnDecodeStepParams& p);
void check(const PagedAttentionParams& p);
void check(const MoeExpertsParams& p);

/// Throws ShapeError where the storage of `t` holds less than its sizes and strides reach. The ops ask it of every
/// tensor; it is for those that others hand to ATen.
void check_storage(std::string_view op, std::string_view arg, const at::Tensor& t);

/// Checks the values inside the index tensors, which must be on the CPU: cu_seqlens starts at 0, never falls and ends
/// at T; slots are kPadSlot or 0..S-1; num_accepted is 1..L; no slot is written twice; blocks, rows and experts exist.
/// Throws RangeError. For callers that did not make the indices themselves.
void check_indices(const RecurrentGatedDeltaRuleParams& p);
void check_indices(const ChunkGatedDeltaRuleParams& p);
void check_indices(const PackedDecodeParams& p);
void check_indices(const CausalConv1dParams& p);
void check_indices(const CausalConv1dUpdateParams& p);
void check_indices(const GdnDecodeStepParams& p);
void check_indices(const PagedAttentionParams& p);
void check_indices(const MoeExpertsParams& p);

/// The two phases for which a backend is chosen. chunk_gated_delta_rule and causal_conv1d belong to prefill, all other
/// ops to decode.
enum class Phase { kPrefill, kDecode };

/// Throws UnsupportedError unless `name` is "auto" or a backend of this build, with its sentence where it is absent.
void check_backend_name(const std::string& name);

/// Throws UnsupportedError unless `accuracy` is one of ChunkGatedDeltaRuleParams.
void check_accuracy_name(const std::string& accuracy);

/// Process-wide choice behind backend = "auto": a backend's name, or "auto" for the order of preference. Starts from
/// the environment: XGDN_PREFILL_BACKEND, XGDN_DECODE_BACKEND. Throws UnsupportedError for an unknown name.
void set_default_backend(Phase phase, const std::string& name);
/// As set, or "auto".
std::string default_backend(Phase phase);

/// Names of the backends that can run in this process, in order of preference.
std::vector<std::string> available_backends();

/// The backend that served the last call of `op` in this process, or "" before the first.
std::string last_backend(std::string_view op);

/// Whether the last call of `op` in this process was batch-invariant: each of its sequences (tokens, where the op has
/// no sequences) has the bits that it would have alone, in any other batch, and with any number of threads. Backends
/// promise it where their own kernels serve the call, never where a library makes a product. False before the first
/// call.
bool last_is_batch_invariant(std::string_view op);

/// One row of doctor(): whether `backend` serves `op` on CPU tensors of a typical shape, else its sentence.
struct BackendReport {
  std::string op;
  std::string backend;
  std::optional<std::string> why_not;  // nullopt: it serves the op
  bool is_selected;                    // what "auto" runs now
  bool is_batch_invariant = false;     // it serves the op, and that call is (last_is_batch_invariant)
};
/// A row for each op and each backend of this build.
std::vector<BackendReport> doctor();

}  // namespace xgdn::kernel
