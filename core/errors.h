// SPDX-License-Identifier: Apache-2.0
// The typed errors of xgdn, shared by every level. Each maps to one Python class (bindings/) and, behind torch.ops, to
// the Python built-in named beside it.
#pragma once

#include <stdexcept>
#include <string>

namespace xgdn {

/// Base of every error that xgdn throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A tensor has the wrong rank, size, stride or contiguity (ValueError).
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// A tensor has the wrong dtype (TypeError).
class DtypeError : public Error {
 public:
  using Error::Error;
};

/// A tensor lives on another device than its neighbours, or a device cannot be used (ValueError).
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// A value inside an index argument is out of range: a slot, a cu_seqlens entry, a token id (IndexError).
class RangeError : public Error {
 public:
  using Error::Error;
};

/// An op needs the step's chunk metadata and did not get it (ValueError).
class MissingMetadataError : public Error {
 public:
  using Error::Error;
};

/// Nothing here can do what was asked: backend, option, architecture (NotImplementedError).
class UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// A checkpoint is missing, damaged, or not what its config says (ValueError).
class CheckpointError : public Error {
 public:
  using Error::Error;
};

/// A request or an option can never be served as asked: empty prompt, bad temperature, prompt longer than the pools
/// (ValueError).
class RequestError : public Error {
 public:
  using Error::Error;
};

/// A request ended with an error while it ran; the others went on (RuntimeError).
class GenerationError : public Error {
 public:
  using Error::Error;
};

/// A request's state or logits are not finite, so no token can be chosen (ArithmeticError, too).
class NumericsError : public GenerationError {
 public:
  using GenerationError::GenerationError;
};

/// An engine loop takes no more requests: it drains or was stopped (RuntimeError).
class StoppedError : public Error {
 public:
  using Error::Error;
};

/// A rank of a model that several processes share has ended, does not answer, or has another model (RuntimeError).
class RankError : public Error {
 public:
  using Error::Error;
};

/// No state slot is free (RuntimeError).
class OutOfSlots : public Error {
 public:
  using Error::Error;
};

/// No KV cache block is free (RuntimeError).
class OutOfBlocks : public Error {
 public:
  using Error::Error;
};

/// What was asked for does not fit into the memory that was allowed (MemoryError).
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

/// A handle names a slot that has been freed or reused since (RuntimeError).
class StaleHandleError : public Error {
 public:
  using Error::Error;
};

}  // namespace xgdn
