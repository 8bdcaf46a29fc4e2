// SPDX-License-Identifier: Apache-2.0
// Every other op that the layer and the models reach on npu tensors: the CPU computes it, one line an op. An op that is
// not here is an error of torch_npu that names it.
#include <ATen/ATen.h>

#include "op.h"

namespace emulated_cann {

using OptionalScalar = std::optional<Scalar>;

// Where a call leaves a dimension out, torch_npu passes an empty tensor.
c10::List<std::optional<Tensor>> index_list(const TensorList& indices) {
  c10::List<std::optional<Tensor>> list;
  for (const Tensor& index : indices) list.push_back(index.numel() > 0 ? std::optional(index) : std::nullopt);
  return list;
}

// Attention of [B, N, S, D] with masks as the fused op takes them: true where a pair is left out.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& masked, double scale,
                 int64_t sparse_mode) {
  const int64_t rows = q.size(2);
  const int64_t columns = k.size(2);
  OptionalTensor allowed;
  if (sparse_mode == 0) {
    if (masked) allowed = at::logical_not(masked->to(at::kBool));
  } else {
    TORCH_CHECK(sparse_mode == 2 || sparse_mode == 3, "sparse_mode ", sparse_mode, " is not emulated");
    const int64_t shift = sparse_mode == 2 ? 0 : columns - rows;  // causal from the upper left, or the lower right
    allowed = at::ones({rows, columns}, q.options().dtype(at::kBool)).tril(shift);
  }
  return at::scaled_dot_product_attention(q, k, v, allowed, 0.0, false, scale, q.size(1) != k.size(1));
}

std::optional<c10::string_view> rounding_mode(int mode) {
  if (mode == 0) return std::nullopt;
  return mode == 1 ? "trunc" : "floor";
}

}  // namespace emulated_cann

ACLNN(FlashAttentionScore,
      [](Tensor q, Tensor k, Tensor v, OptionalTensor pse, OptionalTensor drop_mask, OptionalTensor padding_mask,
         OptionalTensor mask, std::optional<IntArray>, double scale, double, int64_t, int64_t, int64_t,
         const char* layout, int64_t, int64_t sparse_mode, OptionalTensor, OptionalTensor, OptionalTensor, Tensor out) {
        TORCH_CHECK(std::string_view(layout) == "BNSD", "layout ", layout, " is not emulated");
        TORCH_CHECK(!pse && !drop_mask && !padding_mask, "pse, dropout and padding masks are not emulated");
        write(out, attention(q, k, v, mask, scale, sparse_mode));
      })

// clang-format off
#define UNARY(name, function)                                                                  \
  ACLNN(name, [](Tensor self, Tensor out) { write(out, function(self)); })                     \
  ACLNN(Inplace##name, [](Tensor self) { self.copy_(function(self)); })
#define BINARY(name, function)                                                                 \
  ACLNN(name, [](Tensor self, Tensor other, Tensor out) { write(out, function(self, other)); })
#define WITH_TENSOR_OR_SCALAR(name, function)                                                             \
  ACLNN(name##Tensor, [](Tensor self, Tensor other, Tensor out) { write(out, function(self, other)); }) \
  ACLNN(name##Scalar, [](Tensor self, Scalar other, Tensor out) { write(out, function(self, other)); })

// Filling, copying, converting.
ACLNN(InplaceZero, [](Tensor self) { self.zero_(); })
ACLNN(InplaceOne, [](Tensor self) { self.fill_(1); })
ACLNN(InplaceFillScalar, [](Tensor self, Scalar value) { self.fill_(value); })
ACLNN(InplaceFillTensor, [](Tensor self, Tensor value) { self.fill_(value); })
ACLNN(InplaceCopy, [](Tensor self, Tensor from) { self.copy_(from); })
ACLNN(Cast, [](Tensor self, ScalarType, Tensor out) { write(out, self); })
ACLNN(Arange, [](Scalar start, Scalar end, Scalar step, Tensor out) { write(out, at::arange(start, end, step, out.options())); })

// Arithmetic.
ACLNN(Add, [](Tensor self, Tensor other, Scalar alpha, Tensor out) { write(out, at::add(self, other, alpha)); })
ACLNN(Adds, [](Tensor self, Scalar other, Scalar alpha, Tensor out) { write(out, at::add(self, other, alpha)); })
ACLNN(InplaceAdd, [](Tensor self, Tensor other, Scalar alpha) { self.add_(other, alpha); })
ACLNN(InplaceAdds, [](Tensor self, Scalar other, Scalar alpha) { self.add_(other, alpha); })
ACLNN(Sub, [](Tensor self, Tensor other, Scalar alpha, Tensor out) { write(out, at::sub(self, other, alpha)); })
ACLNN(Subs, [](Tensor self, Scalar other, Scalar alpha, Tensor out) { write(out, at::sub(self, other, alpha)); })
ACLNN(Rsubs, [](Tensor self, Scalar other, Scalar alpha, Tensor out) { write(out, at::rsub(self, other, alpha)); })
BINARY(Mul, at::mul)
ACLNN(Muls, [](Tensor self, Scalar other, Tensor out) { write(out, at::mul(self, other)); })
ACLNN(InplaceMul, [](Tensor self, Tensor other) { self.mul_(other); })
ACLNN(InplaceMuls, [](Tensor self, Scalar other) { self.mul_(other); })
ACLNN(Addcmul, [](Tensor self, Tensor left, Tensor right, Scalar value, Tensor out) { write(out, at::addcmul(self, left, right, value)); })
BINARY(Div, at::div)
ACLNN(Divs, [](Tensor self, Scalar other, Tensor out) { write(out, at::div(self, other)); })
ACLNN(InplaceDivs, [](Tensor self, Scalar other) { self.div_(other); })
ACLNN(DivMod, [](Tensor self, Tensor other, int mode, Tensor out) { write(out, at::div(self, other, rounding_mode(mode))); })
ACLNN(DivMods, [](Tensor self, Scalar other, int mode, Tensor out) { write(out, at::div(self, other, rounding_mode(mode))); })
BINARY(FloorDivide, at::floor_divide)
ACLNN(FloorDivides, [](Tensor self, Scalar other, Tensor out) { write(out, at::floor_divide(self, other)); })
ACLNN(PowTensorScalar, [](Tensor self, Scalar exponent, Tensor out) { write(out, at::pow(self, exponent)); })
ACLNN(InplacePowTensorScalar, [](Tensor self, Scalar exponent) { self.pow_(exponent); })
ACLNN(RemainderTensorScalar, [](Tensor self, Scalar other, Tensor out) { write(out, at::remainder(self, other)); })
ACLNN(PowScalarTensor, [](Scalar self, Tensor exponent, Tensor out) { write(out, at::pow(self, exponent)); })
BINARY(PowTensorTensor, at::pow)
BINARY(Maximum, at::maximum)
BINARY(Minimum, at::minimum)

// Functions of one element.
UNARY(Exp, at::exp)
UNARY(Log, at::log)
UNARY(Sqrt, at::sqrt)
UNARY(Rsqrt, at::rsqrt)
UNARY(Reciprocal, at::reciprocal)
UNARY(Neg, at::neg)
UNARY(Abs, at::abs)
UNARY(Cos, at::cos)
UNARY(Sin, at::sin)
UNARY(Tanh, at::tanh)
UNARY(Sigmoid, at::sigmoid)
UNARY(Silu, at::silu)
UNARY(Relu, at::relu)
UNARY(LogicalNot, at::logical_not)
UNARY(BitwiseNot, at::bitwise_not)
UNARY(IsFinite, at::isfinite)
ACLNN(Softplus, [](Tensor self, Scalar beta, Scalar threshold, Tensor out) { write(out, at::softplus(self, beta, threshold)); })
ACLNN(Clamp, [](Tensor self, OptionalScalar least, OptionalScalar most, Tensor out) { write(out, at::clamp(self, least, most)); })
ACLNN(ClampMin, [](Tensor self, Scalar least, Tensor out) { write(out, at::clamp_min(self, least)); })
ACLNN(ClampMax, [](Tensor self, Scalar most, Tensor out) { write(out, at::clamp_max(self, most)); })
ACLNN(ClampMinTensor, [](Tensor self, Tensor least, Tensor out) { write(out, at::clamp_min(self, least)); })
ACLNN(ClampMaxTensor, [](Tensor self, Tensor most, Tensor out) { write(out, at::clamp_max(self, most)); })

// Comparisons and choices.
WITH_TENSOR_OR_SCALAR(Eq, at::eq)
WITH_TENSOR_OR_SCALAR(Ne, at::ne)
WITH_TENSOR_OR_SCALAR(Lt, at::lt)
WITH_TENSOR_OR_SCALAR(Le, at::le)
WITH_TENSOR_OR_SCALAR(Gt, at::gt)
WITH_TENSOR_OR_SCALAR(Ge, at::ge)
BINARY(LogicalAnd, at::logical_and)
BINARY(LogicalOr, at::logical_or)
ACLNN(InplaceLogicalOr, [](Tensor self, Tensor other) { self.logical_or_(other); })
WITH_TENSOR_OR_SCALAR(BitwiseAnd, at::bitwise_and)
WITH_TENSOR_OR_SCALAR(BitwiseOr, at::bitwise_or)
ACLNN(IsClose, [](Tensor self, Tensor other, double relative, double absolute, bool equal_nan, Tensor out) { write(out, at::isclose(self, other, relative, absolute, equal_nan)); })
ACLNN(Equal, [](Tensor self, Tensor other, Tensor out) { out.fill_(at::equal(self, other)); })
ACLNN(SWhere, [](Tensor condition, Tensor self, Tensor other, Tensor out) { write(out, at::where(condition, self, other)); })
ACLNN(InplaceMaskedFillScalar, [](Tensor self, Tensor mask, Scalar value) { self.masked_fill_(mask, value); })
ACLNN(InplaceMaskedFillTensor, [](Tensor self, Tensor mask, Tensor value) { self.masked_fill_(mask, value); })
ACLNN(Tril, [](Tensor self, int64_t diagonal, Tensor out) { write(out, at::tril(self, diagonal)); })
ACLNN(Triu, [](Tensor self, int64_t diagonal, Tensor out) { write(out, at::triu(self, diagonal)); })

// Along a dimension.
ACLNN(ReduceSum, [](Tensor self, IntArray dims, bool keep, ScalarType type, Tensor out) { write(out, at::sum(self, dims, keep, type)); })
ACLNN(Mean, [](Tensor self, IntArray dims, bool keep, ScalarType type, Tensor out) { write(out, at::mean(self, dims, keep, type)); })
ACLNN(Max, [](Tensor self, Tensor out) { write(out, at::max(self)); })
ACLNN(Min, [](Tensor self, Tensor out) { write(out, at::min(self)); })
ACLNN(Amax, [](Tensor self, IntArray dims, bool keep, Tensor out) { write(out, at::amax(self, dims, keep)); })
ACLNN(Amin, [](Tensor self, IntArray dims, bool keep, Tensor out) { write(out, at::amin(self, dims, keep)); })
ACLNN(MaxDim, [](Tensor self, int64_t dim, bool keep, Tensor out, Tensor at) { const auto [values, places] = at::max(self, dim, keep); write(out, values); write(at, places); })
ACLNN(MinDim, [](Tensor self, int64_t dim, bool keep, Tensor out, Tensor at) { const auto [values, places] = at::min(self, dim, keep); write(out, values); write(at, places); })
ACLNN(ArgMax, [](Tensor self, int64_t dim, bool keep, Tensor out) { write(out, at::argmax(self, dim, keep)); })
ACLNN(ArgMin, [](Tensor self, int64_t dim, bool keep, Tensor out) { write(out, at::argmin(self, dim, keep)); })
ACLNN(Any, [](Tensor self, IntArray dims, bool keep, Tensor out) { write(out, at::any(self, dims, keep)); })
ACLNN(All, [](Tensor self, IntArray dims, bool keep, Tensor out) { write(out, at::all(self, dims, keep)); })
ACLNN(LinalgVectorNorm, [](Tensor self, Scalar order, IntArray dims, bool keep, ScalarType type, Tensor out) { write(out, at::linalg_vector_norm(self, order, dims, keep, type)); })
ACLNN(RmsNorm, [](Tensor self, Tensor gamma, double eps, Tensor out, Tensor rstd) { const Tensor scale = at::rsqrt(at::mean(self.to(at::kFloat).square(), {-1}, true) + eps); write(out, self.to(at::kFloat) * scale * gamma.to(at::kFloat)); write(rstd, scale); })
ACLNN(Cumsum, [](Tensor self, int64_t dim, ScalarType type, Tensor out) { write(out, at::cumsum(self, dim, type)); })
ACLNN(Softmax, [](Tensor self, int64_t dim, Tensor out) { write(out, at::softmax(self, dim, out.scalar_type())); })
ACLNN(LogSoftmax, [](Tensor self, int64_t dim, Tensor out) { write(out, at::log_softmax(self, dim, out.scalar_type())); })
ACLNN(Topk, [](Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, Tensor out, Tensor at) { const auto [values, places] = at::topk(self, k, dim, largest, sorted); write(out, values); write(at, places); })
ACLNN(Sort, [](Tensor self, bool stable, int64_t dim, bool descending, Tensor out, Tensor at) { const auto [values, places] = at::sort(self, stable, dim, descending); write(out, values); write(at, places); })
ACLNN(Cat, [](TensorList parts, int64_t dim, Tensor out) { write(out, at::cat(parts, dim)); })
ACLNN(Stack, [](TensorList parts, int64_t dim, Tensor out) { write(out, at::stack(parts, dim)); })
ACLNN(Repeat, [](Tensor self, IntArray repeats, Tensor out) { write(out, self.repeat(repeats)); })
ACLNN(Flip, [](Tensor self, IntArray dims, Tensor out) { write(out, at::flip(self, dims)); })
ACLNN(ConstantPadNd, [](Tensor self, IntArray pad, Scalar value, Tensor out) { write(out, at::constant_pad_nd(self, pad, value)); })

// By index.
ACLNN(Index, [](Tensor self, TensorList indices, Tensor out) { write(out, at::index(self, index_list(indices))); })
ACLNN(IndexPutImpl, [](Tensor self, TensorList indices, Tensor values, bool accumulate, bool) { self.index_put_(index_list(indices), values, accumulate); })
ACLNN(IndexSelect, [](Tensor self, int64_t dim, Tensor index, Tensor out) { write(out, at::index_select(self, dim, index)); })
ACLNN(Gather, [](Tensor self, int64_t dim, Tensor index, Tensor out) { write(out, at::gather(self, dim, index)); })
ACLNN(Embedding, [](Tensor weight, Tensor index, Tensor out) { write(out, at::embedding(weight, index)); })
ACLNN(IndexCopy, [](Tensor self, int64_t dim, Tensor index, Tensor source, Tensor out) { write(out, at::index_copy(self, dim, index, source)); })
ACLNN(InplaceIndexCopy, [](Tensor self, int64_t dim, Tensor index, Tensor source) { self.index_copy_(dim, index, source); })
ACLNN(IndexAdd, [](Tensor self, int64_t dim, Tensor index, Tensor source, Scalar alpha, Tensor out) { write(out, at::index_add(self, dim, index, source, alpha)); })
ACLNN(ScatterAdd, [](Tensor self, int64_t dim, Tensor index, Tensor source, Tensor out) { write(out, at::scatter_add(self, dim, index, source)); })
ACLNN(SearchSorted, [](Tensor sorted, Tensor self, bool int32, bool right, OptionalTensor sorter, Tensor out) { write(out, at::searchsorted(sorted, self, int32, right, std::nullopt, sorter)); })
ACLNN(RepeatInterleave, [](Tensor self, Tensor repeats, int64_t size, Tensor out) { write(out, at::repeat_interleave(self, repeats, std::nullopt, size)); })
ACLNN(RepeatInterleaveWithDim, [](Tensor self, Tensor repeats, int64_t dim, int64_t size, Tensor out) { write(out, at::repeat_interleave(self, repeats, dim, size)); })
ACLNN(RepeatInterleaveInt, [](Tensor self, int64_t repeats, int64_t, Tensor out) { write(out, at::repeat_interleave(self, repeats)); })
ACLNN(RepeatInterleaveIntWithDim, [](Tensor self, int64_t repeats, int64_t dim, int64_t, Tensor out) { write(out, at::repeat_interleave(self, repeats, dim)); })

// Products.
ACLNN(Matmul, [](Tensor self, Tensor other, Tensor out, int8_t) { write(out, at::matmul(self, other)); })
ACLNN(Mm, [](Tensor self, Tensor other, Tensor out, int8_t) { write(out, at::mm(self, other)); })
ACLNN(BatchMatMul, [](Tensor self, Tensor other, Tensor out, int8_t) { write(out, at::bmm(self, other)); })
ACLNN(Addmm, [](Tensor self, Tensor left, Tensor right, Scalar beta, Scalar alpha, Tensor out, int8_t) { write(out, at::addmm(self, left, right, beta, alpha)); })
ACLNN(Baddbmm, [](Tensor self, Tensor left, Tensor right, Scalar beta, Scalar alpha, Tensor out, int8_t) { write(out, at::baddbmm(self, left, right, beta, alpha)); })
// clang-format on
