// SPDX-License-Identifier: Apache-2.0
// Collectives between processes of one machine: what torch_npu's process group needs for sums, broadcasts, gathers and
// barriers. Rank 0 has a connection to each of the others, compares what they ask for, computes, and answers.
//
//   rank 1, 2, ..  ->  call, its bytes  ->  rank 0  ->  status, length, result or sentence  ->  rank 1, 2, ..
//
// A sum is added in the order of the ranks, 16-bit floats in float32, rounded once.
#include <acl/acl.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <third_party/hccl/inc/hccl/hccl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "emulated.h"

namespace emulated_cann {
namespace {

using Clock = std::chrono::steady_clock;
using Bytes = std::vector<char>;

constexpr std::chrono::seconds kConnectTime{120};     // HCCL_CONNECT_TIMEOUT's default
constexpr std::chrono::seconds kExecutionTime{1836};  // HCCL_EXEC_TIMEOUT's default

struct Failure {
  HcclResult status;
  std::string sentence;
};

HcclResult refuse(HcclResult status, const std::string& sentence) {
  fail(status, sentence);
  return status;
}

std::chrono::seconds seconds_of(const char* variable, std::chrono::seconds otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr ? otherwise : std::chrono::seconds(std::atoll(value));
}

struct Type {
  const char* name;
  size_t size;
};

std::optional<Type> type_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return Type{"int8", 1};
    case HCCL_DATA_TYPE_UINT8:
      return Type{"uint8", 1};
    case HCCL_DATA_TYPE_INT16:
      return Type{"int16", 2};
    case HCCL_DATA_TYPE_INT32:
      return Type{"int32", 4};
    case HCCL_DATA_TYPE_INT64:
      return Type{"int64", 8};
    case HCCL_DATA_TYPE_FP16:
      return Type{"fp16", 2};
    case HCCL_DATA_TYPE_BFP16:
      return Type{"bfp16", 2};
    case HCCL_DATA_TYPE_FP32:
      return Type{"fp32", 4};
    case HCCL_DATA_TYPE_FP64:
      return Type{"fp64", 8};
    default:
      return std::nullopt;
  }
}

template <typename T>
void add(const std::vector<Bytes>& parts, Bytes& total) {
  constexpr bool kIsReduced = std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>;
  using Sum = std::conditional_t<kIsReduced, float, T>;
  for (size_t at = 0; at < total.size(); at += sizeof(T)) {
    Sum sum{};
    for (const Bytes& part : parts) {
      T value;
      std::memcpy(&value, part.data() + at, sizeof(T));
      sum = static_cast<Sum>(sum + static_cast<Sum>(value));
    }
    const T rounded = static_cast<T>(sum);
    std::memcpy(total.data() + at, &rounded, sizeof(T));
  }
}

using Add = void (*)(const std::vector<Bytes>& parts, Bytes& total);

// The types that the vendor documents for a sum.
Add adder(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return add<int8_t>;
    case HCCL_DATA_TYPE_INT16:
      return add<int16_t>;
    case HCCL_DATA_TYPE_INT32:
      return add<int32_t>;
    case HCCL_DATA_TYPE_INT64:
      return add<int64_t>;
    case HCCL_DATA_TYPE_FP16:
      return add<c10::Half>;
    case HCCL_DATA_TYPE_BFP16:
      return add<c10::BFloat16>;
    case HCCL_DATA_TYPE_FP32:
      return add<float>;
    default:
      return nullptr;
  }
}

enum class Kind : uint32_t { kAllReduce, kBroadcast, kAllGather };

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kAllReduce:
      return "AllReduce";
    case Kind::kBroadcast:
      return "Broadcast";
    case Kind::kAllGather:
      return "AllGather";
  }
  return "";
}

// What all ranks must agree on.
struct Call {
  Kind kind;
  uint32_t root;  // of a broadcast
  uint64_t count;
  HcclDataType type;

  bool operator==(const Call&) const = default;
  size_t bytes() const { return count * type_of(type)->size; }
};

std::string show(const Call& call) {
  const std::string from = call.kind == Kind::kBroadcast ? " from rank " + std::to_string(call.root) : "";
  return std::string(name_of(call.kind)) + " of " + std::to_string(call.count) + " " + type_of(call.type)->name + from;
}

struct Hello {
  uint32_t rank;
  uint32_t world;
  int32_t device;
};

struct Answer {
  int32_t status;
  uint64_t bytes;
};

class Connection {
 public:
  explicit Connection(int socket) : socket_(socket) {}
  ~Connection() { ::close(socket_); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Ends what waits in the functions below.
  void shut() {
    is_shut_ = true;
    ::shutdown(socket_, SHUT_RDWR);
  }

  void send(const void* begin, size_t bytes, Clock::time_point end) {
    transfer(POLLOUT, bytes, end, [&](size_t done) {
      return ::send(socket_, static_cast<const char*>(begin) + done, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT);
    });
  }
  void receive(void* begin, size_t bytes, Clock::time_point end) {
    transfer(POLLIN, bytes, end, [&](size_t done) {
      return ::recv(socket_, static_cast<char*>(begin) + done, bytes - done, MSG_DONTWAIT);
    });
  }

 private:
  template <typename Move>
  void transfer(short what, size_t bytes, Clock::time_point end, const Move& move) {
    for (size_t done = 0; done < bytes;) {
      const ssize_t moved = move(done);
      if (moved > 0) {
        done += static_cast<size_t>(moved);
      } else if (moved < 0 && (errno == EAGAIN || errno == EINTR)) {
        await(what, end);
      } else {
        throw Failure{HCCL_E_REMOTE, is_shut_ ? "the communicator was destroyed" : "the process has ended"};
      }
    }
  }

  void await(short what, Clock::time_point end) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    if (left.count() <= 0) throw Failure{HCCL_E_TIMEOUT, "no answer in time"};
    pollfd one{socket_, what, 0};
    ::poll(&one, 1, static_cast<int>(left.count()));
  }

  int socket_;
  std::atomic<bool> is_shut_ = false;
};

class Communicator {
 public:
  Communicator(uint32_t rank, uint32_t world, int device, std::chrono::seconds time)
      : rank_(rank), device_(device), time_(time), peers_(world) {}

  void connect(uint32_t peer, std::unique_ptr<Connection> connection) { peers_[peer] = std::move(connection); }
  Connection& peer(uint32_t rank) { return *peers_[rank]; }
  uint32_t rank() const { return rank_; }
  uint32_t world() const { return static_cast<uint32_t>(peers_.size()); }
  int device() const { return device_; }
  HcclResult status() const { return status_; }

  void shut() {
    for (const auto& peer : peers_) {
      if (peer != nullptr) peer->shut();
    }
  }

  // Returns what went wrong, or "". Nothing can be exchanged then.
  std::string run(const Call& call, const void* from, void* to) {
    const Clock::time_point end = Clock::now() + time_;
    try {
      if (status_ != HCCL_SUCCESS) throw Failure{status_, "the communicator has failed before"};
      const auto* first = static_cast<const char*>(from);
      Bytes own(first, first + call.bytes());
      const Bytes result = rank_ == 0 ? serve(call, std::move(own), end) : ask(call, own, end);
      std::memcpy(to, result.data(), result.size());
      return "";
    } catch (const Failure& failure) {
      status_ = failure.status;
      shut();
      return show(call) + " on rank " + std::to_string(rank_) + ": " + failure.sentence;
    }
  }

 private:
  Bytes ask(const Call& call, const Bytes& own, Clock::time_point end) {
    Answer answer{};
    Bytes result;
    try {
      peer(0).send(&call, sizeof call, end);
      peer(0).send(own.data(), own.size(), end);
      peer(0).receive(&answer, sizeof answer, end);
      result.resize(answer.bytes);
      peer(0).receive(result.data(), result.size(), end);
    } catch (const Failure& failure) {
      throw Failure{failure.status, "rank 0: " + failure.sentence};
    }
    if (answer.status != HCCL_SUCCESS) {
      throw Failure{static_cast<HcclResult>(answer.status), std::string(result.begin(), result.end())};
    }
    return result;
  }

  Bytes serve(const Call& call, Bytes own, Clock::time_point end) {
    Bytes result;
    try {
      result = computed(call, received(call, std::move(own), end));
    } catch (const Failure& failure) {
      for (uint32_t rank = 1; rank < world(); ++rank) {
        try {
          answer(rank, failure.status, failure.sentence.data(), failure.sentence.size(), end);
        } catch (const Failure&) {  // it has ended
        }
      }
      throw;
    }
    for (uint32_t rank = 1; rank < world(); ++rank) answer(rank, HCCL_SUCCESS, result.data(), result.size(), end);
    return result;
  }

  void answer(uint32_t rank, HcclResult status, const char* begin, size_t bytes, Clock::time_point end) {
    const Answer head{status, bytes};
    peer(rank).send(&head, sizeof head, end);
    peer(rank).send(begin, bytes, end);
  }

  std::vector<Bytes> received(const Call& call, Bytes own, Clock::time_point end) {
    std::vector<Bytes> parts{std::move(own)};
    for (uint32_t rank = 1; rank < world(); ++rank) {
      const std::string who = "rank " + std::to_string(rank) + ": ";
      try {
        Call theirs{};
        peer(rank).receive(&theirs, sizeof theirs, end);
        parts.emplace_back(theirs.bytes());
        peer(rank).receive(parts.back().data(), theirs.bytes(), end);
        if (theirs != call) throw Failure{HCCL_E_PARA, "expected " + show(call) + ", got " + show(theirs)};
      } catch (const Failure& failure) {
        throw Failure{failure.status, who + failure.sentence};
      }
    }
    return parts;
  }

  static Bytes computed(const Call& call, const std::vector<Bytes>& parts) {
    switch (call.kind) {
      case Kind::kAllReduce: {
        Bytes total(call.bytes());
        adder(call.type)(parts, total);
        return total;
      }
      case Kind::kBroadcast:
        return parts[call.root];
      case Kind::kAllGather: {
        Bytes all;
        for (const Bytes& part : parts) all.insert(all.end(), part.begin(), part.end());
        return all;
      }
    }
    return {};
  }

  uint32_t rank_;
  int device_;
  std::chrono::seconds time_;
  std::vector<std::unique_ptr<Connection>> peers_;  // of rank 0 all others, of another rank 0
  std::atomic<HcclResult> status_ = HCCL_SUCCESS;
};

using CommunicatorPointer = std::shared_ptr<Communicator>;

// Those that have not been destroyed: torch_npu's task queue may still use a handle that an abort has ended.
class Communicators {
 public:
  HcclComm add(CommunicatorPointer communicator) {
    const std::lock_guard lock(mutex_);
    HcclComm handle = communicator.get();
    live_[handle] = std::move(communicator);
    return handle;
  }
  CommunicatorPointer find(HcclComm handle) {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(handle);
    return found == live_.end() ? nullptr : found->second;
  }
  CommunicatorPointer remove(HcclComm handle) {
    const std::lock_guard lock(mutex_);
    const auto found = live_.extract(handle);
    return found.empty() ? nullptr : found.mapped();
  }

 private:
  std::mutex mutex_;
  std::map<HcclComm, CommunicatorPointer> live_;
};

Communicators& communicators() {
  static auto* const all = new Communicators;
  return *all;
}

// The sockets of HcclGetRootInfo, until their communicator takes them.
std::mutex listeners_mutex;
std::map<std::string, int> listeners;

// A name that no file has, and that goes with its process.
sockaddr_un address_of(const std::string& name, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  name.copy(address.sun_path + 1, sizeof address.sun_path - 1);
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

int new_socket() {
  return ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

void accept_all(Communicator& communicator, int listener, Clock::time_point end) {
  std::vector<std::optional<int32_t>> devices(communicator.world());
  devices[0] = communicator.device();
  for (uint32_t count = 1; count < communicator.world(); ++count) {
    pollfd one{listener, POLLIN, 0};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    if (left.count() <= 0 || ::poll(&one, 1, static_cast<int>(left.count())) <= 0) {
      throw Failure{HCCL_E_TIMEOUT, "expected " + std::to_string(communicator.world()) + " ranks, got " +
                                        std::to_string(count) + " in time"};
    }
    auto connection = std::make_unique<Connection>(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    Hello hello{};
    connection->receive(&hello, sizeof hello, end);
    if (hello.world != communicator.world() || hello.rank == 0 || hello.rank >= communicator.world() ||
        devices[hello.rank]) {
      throw Failure{HCCL_E_PARA, "expected another rank of " + std::to_string(communicator.world()) + ", got rank " +
                                     std::to_string(hello.rank) + " of " + std::to_string(hello.world)};
    }
    for (const std::optional<int32_t>& device : devices) {
      if (device == hello.device) {
        throw Failure{HCCL_E_PARA, "expected a device for each rank, got two on device " + std::to_string(*device)};
      }
    }
    devices[hello.rank] = hello.device;
    communicator.connect(hello.rank, std::move(connection));
  }
  const int32_t ready = HCCL_SUCCESS;
  for (uint32_t rank = 1; rank < communicator.world(); ++rank) communicator.peer(rank).send(&ready, sizeof ready, end);
}

void join(Communicator& communicator, const std::string& name, Clock::time_point end) {
  socklen_t length = 0;
  const sockaddr_un address = address_of(name, length);
  const int socket = new_socket();
  communicator.connect(0, std::make_unique<Connection>(socket));
  if (::connect(socket, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    throw Failure{HCCL_E_TCP_CONNECT, "rank 0 does not listen at " + name};
  }
  const Hello hello{communicator.rank(), communicator.world(), communicator.device()};
  communicator.peer(0).send(&hello, sizeof hello, end);
  int32_t ready = 0;
  communicator.peer(0).receive(&ready, sizeof ready, end);
}

HcclResult initialise(uint32_t world, const HcclRootInfo* root, uint32_t rank, std::chrono::seconds time,
                      HcclComm* handle) {
  if (root == nullptr || handle == nullptr) return refuse(HCCL_E_PTR, "HcclCommInitRootInfo: a null pointer");
  if (world == 0 || rank >= world) {
    return refuse(HCCL_E_PARA, "HcclCommInitRootInfo: expected a rank below " + std::to_string(world) + ", got " +
                                   std::to_string(rank));
  }
  int32_t device = 0;
  if (aclrtGetDevice(&device) != ACL_SUCCESS) {
    return refuse(HCCL_E_RUNTIME, "HcclCommInitRootInfo: expected a device that is set, got none");
  }
  const std::string name(root->internal, ::strnlen(root->internal, sizeof root->internal));
  auto communicator = std::make_shared<Communicator>(rank, world, device, time);
  const Clock::time_point end = Clock::now() + seconds_of("HCCL_CONNECT_TIMEOUT", kConnectTime);
  int listener = -1;
  try {
    if (rank > 0) {
      join(*communicator, name, end);
    } else {
      {
        const std::lock_guard lock(listeners_mutex);
        const auto found = listeners.find(name);
        if (found == listeners.end()) throw Failure{HCCL_E_PARA, "expected the root info of this process, got " + name};
        listener = found->second;
        listeners.erase(found);
      }
      accept_all(*communicator, listener, end);
    }
  } catch (const Failure& failure) {
    if (listener >= 0) ::close(listener);
    return refuse(failure.status, "HcclCommInitRootInfo on rank " + std::to_string(rank) + ": " + failure.sentence);
  }
  if (listener >= 0) ::close(listener);
  record("{\"kind\": \"communicator\", \"rank\": " + std::to_string(rank) + ", \"world\": " + std::to_string(world) +
         ", \"device\": " + std::to_string(device) + "}");
  *handle = communicators().add(std::move(communicator));
  return HCCL_SUCCESS;
}

HcclResult start(const Call& call, const void* from, void* to, HcclComm handle, aclrtStream stream) {
  const CommunicatorPointer communicator = communicators().find(handle);
  const std::string name = std::string("Hccl") + name_of(call.kind) + ": ";
  if (communicator == nullptr || stream == nullptr) {
    return refuse(HCCL_E_PTR, name + "expected a stream and a communicator that is not destroyed");
  }
  if (!type_of(call.type) || (call.kind == Kind::kAllReduce && adder(call.type) == nullptr)) {
    return refuse(HCCL_E_NOT_SUPPORT, name + "data type " + std::to_string(call.type) + " is not supported");
  }
  if (call.root >= communicator->world()) {
    return refuse(HCCL_E_PARA, name + "expected a root below " + std::to_string(communicator->world()) + ", got " +
                                   std::to_string(call.root));
  }
  const size_t room = call.bytes() * (call.kind == Kind::kAllGather ? communicator->world() : 1);
  if (device_of(from, call.bytes()) != communicator->device() || device_of(to, room) != communicator->device()) {
    return refuse(HCCL_E_PARA, name + "expected memory of device " + std::to_string(communicator->device()) + " for " +
                                   show(call) + ", got another address");
  }
  record("{\"kind\": \"collective\", \"name\": " + quoted(name_of(call.kind)) +
         ", \"count\": " + std::to_string(call.count) + ", \"dtype\": " + quoted(type_of(call.type)->name) +
         ", \"root\": " + std::to_string(call.root) + "}");
  enqueue(stream, [communicator, call, from, to] { return communicator->run(call, from, to); });
  return HCCL_SUCCESS;
}

}  // namespace
}  // namespace emulated_cann

using namespace emulated_cann;

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root) {
  static std::atomic<int> count = 0;
  const std::string name = "emulated-hccl/" + std::to_string(::getpid()) + "/" + std::to_string(count++);
  socklen_t length = 0;
  const sockaddr_un address = address_of(name, length);
  const int socket = new_socket();
  if (::bind(socket, reinterpret_cast<const sockaddr*>(&address), length) != 0 || ::listen(socket, SOMAXCONN) != 0) {
    ::close(socket);
    return refuse(HCCL_E_SYSCALL, "HcclGetRootInfo: " + name + ": " + std::strerror(errno));
  }
  *root = {};
  name.copy(root->internal, sizeof root->internal - 1);
  const std::lock_guard lock(listeners_mutex);
  listeners[name] = socket;
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t world, const HcclRootInfo* root, uint32_t rank, HcclComm* handle) {
  return initialise(world, root, rank, seconds_of("HCCL_EXEC_TIMEOUT", kExecutionTime), handle);
}
HcclResult HcclCommInitRootInfoConfig(uint32_t world, const HcclRootInfo* root, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* handle) {
  const bool is_set = config != nullptr && config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET;
  if (!is_set) return HcclCommInitRootInfo(world, root, rank, handle);
  return initialise(world, root, rank, std::chrono::seconds(config->hcclExecTimeOut), handle);
}
uint32_t HcclGetCommConfigCapability() {
  return HCCL_COMM_CONFIG_RESERVED;
}
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) {
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommName(HcclComm, char* name) {
  std::strcpy(name, "emulated");
  return HCCL_SUCCESS;
}

// Calls that wait end with an error; the last of them frees it.
HcclResult HcclCommDestroy(HcclComm handle) {
  const CommunicatorPointer communicator = communicators().remove(handle);
  if (communicator == nullptr) return refuse(HCCL_E_PTR, "HcclCommDestroy: there is no such communicator");
  communicator->shut();
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult* status) {
  const CommunicatorPointer communicator = communicators().find(handle);
  if (communicator == nullptr) return refuse(HCCL_E_PTR, "HcclGetCommAsyncError: there is no such communicator");
  *status = communicator->status();
  return HCCL_SUCCESS;
}

HcclResult HcclAllReduce(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                         aclrtStream stream) {
  if (op != HCCL_REDUCE_SUM) {
    return refuse(HCCL_E_NOT_SUPPORT, "HcclAllReduce: reduction " + std::to_string(op) + " is not emulated");
  }
  return start({Kind::kAllReduce, 0, count, type}, from, to, handle, stream);
}
HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                         aclrtStream stream) {
  return start({Kind::kBroadcast, root, count, type}, buffer, buffer, handle, stream);
}
HcclResult HcclAllGather(void* from, void* to, uint64_t count, HcclDataType type, HcclComm handle, aclrtStream stream) {
  return start({Kind::kAllGather, 0, count, type}, from, to, handle, stream);
}
}
