// SPDX-License-Identifier: Apache-2.0
// Streams and events. Operators and copies have happened when their call returns; jobs, which wait for other processes,
// run in a thread of their stream. A job that nobody waits for begins late, so that a reader which is not ordered
// behind it finds the bytes from before. Waiting blocks the host, also where a device would wait.
#include <acl/acl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "emulated.h"

namespace emulated_cann {
namespace {

constexpr std::chrono::milliseconds kLate{20};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  void enqueue(Job job) {
    const std::lock_guard lock(mutex_);
    if (num_enqueued_++ == 0) std::thread([self = shared_from_this()] { self->run(); }).detach();
    jobs_.push_back(std::move(job));
    changed_.notify_all();
  }

  uint64_t num_enqueued() {
    const std::lock_guard lock(mutex_);
    return num_enqueued_;
  }

  bool has_run(uint64_t count) {
    const std::lock_guard lock(mutex_);
    return num_run_ >= count;
  }

  // Until so many jobs have run. Returns what has gone wrong on this stream so far, or "".
  std::string await(uint64_t count) {
    std::unique_lock lock(mutex_);
    num_awaited_ = std::max(num_awaited_, count);
    changed_.notify_all();
    changed_.wait(lock, [&] { return num_run_ >= count; });
    return failure_;
  }

  // Nothing that comes after a failure happens.
  void fail(const std::string& sentence) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = sentence;
  }

  void close() {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    changed_.notify_all();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return is_closed_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      changed_.wait_for(lock, kLate, [&] { return is_closed_ || num_awaited_ > num_run_; });
      const Job job = std::move(jobs_.front());
      jobs_.pop_front();
      if (failure_.empty()) {
        lock.unlock();
        const std::string failure = job();
        lock.lock();
        if (failure_.empty()) failure_ = failure;
      }
      ++num_run_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  uint64_t num_enqueued_ = 0;
  uint64_t num_run_ = 0;
  uint64_t num_awaited_ = 0;
  bool is_closed_ = false;
  std::string failure_;
};

using StreamPointer = std::shared_ptr<Stream>;

// A place in a stream: what was enqueued there before.
struct Event {
  StreamPointer stream;
  uint64_t num_jobs = 0;
  std::chrono::steady_clock::time_point recorded;

  std::string await() const { return stream == nullptr ? "" : stream->await(num_jobs); }
};

std::mutex streams_mutex;

std::set<StreamPointer*>& streams() {
  static auto* const all = new std::set<StreamPointer*>;
  return *all;
}

StreamPointer stream_of(aclrtStream handle) {
  return handle == nullptr ? nullptr : *static_cast<StreamPointer*>(handle);
}

aclError create_stream(aclrtStream* handle) {
  auto* const stream = new StreamPointer(std::make_shared<Stream>());
  const std::lock_guard lock(streams_mutex);
  streams().insert(stream);
  *handle = stream;
  return ACL_SUCCESS;
}

aclError destroy_stream(aclrtStream handle) {
  auto* const stream = static_cast<StreamPointer*>(handle);
  {
    const std::lock_guard lock(streams_mutex);
    streams().erase(stream);
  }
  (*stream)->close();
  delete stream;
  return ACL_SUCCESS;
}

aclError create_event(aclrtEvent* event) {
  *event = new Event;
  return ACL_SUCCESS;
}

aclError synchronised(const char* what, const std::string& failure) {
  record(sync_line(what));
  return failure.empty() ? ACL_SUCCESS : fail(kKernelException, failure);
}

std::string await_all(const StreamPointer& stream) {
  return stream == nullptr ? "" : stream->await(stream->num_enqueued());
}

aclError synchronise_stream(aclrtStream handle) {
  return synchronised("stream", await_all(stream_of(handle)));
}

aclError synchronise_device() {
  std::vector<StreamPointer> all;
  {
    const std::lock_guard lock(streams_mutex);
    for (const StreamPointer* stream : streams()) all.push_back(*stream);
  }
  std::string first;
  for (const StreamPointer& stream : all) {
    const std::string failure = await_all(stream);
    if (first.empty()) first = failure;
  }
  return synchronised("device", first);
}

}  // namespace

void enqueue(void* stream, Job job) {
  stream_of(stream)->enqueue(std::move(job));
}

void await_stream(void* stream) {
  await_all(stream_of(stream));
}

}  // namespace emulated_cann

using namespace emulated_cann;

extern "C" {

aclError aclrtSynchronizeDevice() {
  return synchronise_device();
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) {
  return synchronise_device();
}
aclError aclrtCreateStream(aclrtStream* stream) {
  return create_stream(stream);
}
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  return create_stream(stream);
}
aclError aclrtDestroyStream(aclrtStream stream) {
  return destroy_stream(stream);
}
aclError aclrtDestroyStreamForce(aclrtStream stream) {
  return destroy_stream(stream);
}
aclError aclrtSynchronizeStream(aclrtStream stream) {
  return synchronise_stream(stream);
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
  return synchronise_stream(stream);
}
aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  const StreamPointer stream = stream_of(handle);
  const bool has_run = stream == nullptr || stream->has_run(stream->num_enqueued());
  *status = has_run ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
aclError aclrtStreamWaitEvent(aclrtStream handle, aclrtEvent event) {
  const std::string failure = static_cast<Event*>(event)->await();
  const StreamPointer stream = stream_of(handle);
  if (stream != nullptr && !failure.empty()) stream->fail(failure);
  return ACL_SUCCESS;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
  return create_event(event);
}
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) {
  return create_event(event);
}
aclError aclrtDestroyEvent(aclrtEvent event) {
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}
aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  const StreamPointer stream = stream_of(stream_handle);
  *static_cast<Event*>(handle) = {stream, stream == nullptr ? 0 : stream->num_enqueued(),
                                  std::chrono::steady_clock::now()};
  return ACL_SUCCESS;
}
aclError aclrtResetEvent(aclrtEvent, aclrtStream) {
  return ACL_SUCCESS;
}
aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  const auto* event = static_cast<Event*>(handle);
  const bool has_run = event->stream == nullptr || event->stream->has_run(event->num_jobs);
  *status = has_run ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
aclError aclrtSynchronizeEvent(aclrtEvent event) {
  return synchronised("event", static_cast<Event*>(event)->await());
}
aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent begin, aclrtEvent end) {
  const auto elapsed = static_cast<Event*>(end)->recorded - static_cast<Event*>(begin)->recorded;
  *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  return ACL_SUCCESS;
}
}
