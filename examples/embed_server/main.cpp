// SPDX-License-Identifier: Apache-2.0
// An HTTP server around xgdn::Engine, made to be copied: token ids in, token ids out.
//   embed_server MODEL [PORT]     port 0, the default, takes a free one; the first line of output names it
// xgdn::EngineLoop steps the engine. Each HTTP thread submits its client's request and waits on that request's own
// queue, so all clients share each step. There is no tokenizer: add a library of your choice, or run `xgdn serve` for
// text.
#define JSON_DIAGNOSTICS 1  // nlohmann's errors name the field
#include <httplib.h>

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>

#include "core/runtime/engine_loop.h"

using nlohmann::json;
using xgdn::EngineLoop, xgdn::FinishReason, xgdn::Request, xgdn::RequestError, xgdn::RequestEvent, xgdn::RequestId;
using namespace std::chrono_literals;
constexpr const char* kHost = "127.0.0.1";

class Generation {  // a client's request while it is answered; whoever lets go of it before its end cancels it
 public:
  Generation(EngineLoop& loop, const Request& request)
      : num_prompt(std::ssize(request.prompt)), num_running(request.n), loop_(loop) {
    id_ = loop.submit(request, [queue = queue_](const RequestEvent& event) {  // on the loop's thread
      const std::lock_guard lock(queue->mutex);
      queue->events.push_back(event);
      queue->arrived.notify_one();
    });
  }
  ~Generation() { loop_.cancel(id_); }

  // The next event, or nothing when none came for a while.
  std::optional<RequestEvent> next() {
    std::unique_lock lock(queue_->mutex);
    if (!queue_->arrived.wait_for(lock, 100ms, [&] { return !queue_->events.empty(); })) return {};
    const RequestEvent event = std::move(queue_->events.front());
    queue_->events.pop_front();
    num_new += std::ssize(event.tokens);
    num_running -= event.finish_reason != FinishReason::kRunning;
    return event;
  }

  json usage() const {
    return {{"prompt_tokens", num_prompt}, {"completion_tokens", num_new}, {"total_tokens", num_prompt + num_new}};
  }

  static inline std::atomic<int> num_open = 0;
  int64_t num_prompt, num_running, num_new = 0;  // prompt tokens; branches; tokens of all branches

 private:
  struct Queue {
    std::mutex mutex;
    std::deque<RequestEvent> events;
    std::condition_variable arrived;
  };
  struct Open {
    Open() { ++num_open; }
    ~Open() { --num_open, num_open.notify_all(); }
  } open_;
  EngineLoop& loop_;
  std::shared_ptr<Queue> queue_ = std::make_shared<Queue>();  // shared with the callback, which may outlive this
  RequestId id_;
};

void take(json& body, const char* name, auto& value) {  // an absent field, or null, leaves the value
  const json& field = body[name];
  if (!field.is_null() && json(field.get_to(value)) != field)  // 1.5 and true shall not become 1
    throw RequestError(c10::str(name, ": ", field.dump().substr(0, 80), " is not of this field's type"));
  body.erase(name);
}

Request parse(json body, bool& is_stream) {
  Request request{.sampling = {.temperature = 1.0, .seed = std::random_device()()}};
  take(body, "prompt", request.prompt);
  take(body, "max_tokens", request.max_new_tokens);
  take(body, "temperature", request.sampling.temperature);
  take(body, "top_p", request.sampling.top_p);
  take(body, "top_k", request.sampling.top_k);
  take(body, "seed", request.sampling.seed);
  take(body, "stop_token_ids", request.stop_token_ids);
  take(body, "ignore_eos", request.ignore_eos);
  take(body, "n", request.n);
  take(body, "stream", is_stream);
  body.erase("model");  // there is one
  if (!body.empty()) throw RequestError("unknown field: " + body.begin().key());
  return request;
}

void add(const RequestEvent& event, json& choice) {
  static const json kFinishNames[] = {nullptr, "stop", "length", "cancelled", "error"};  // in the order of FinishReason
  choice["index"] = event.branch;
  for (const int32_t token : event.tokens) choice["token_ids"].push_back(token);
  choice["finish_reason"] = kFinishNames[static_cast<int>(event.finish_reason)];
}

json error(int status, const std::string& message) {
  return {{"error", {{"message", message}, {"type", status < 500 ? "invalid_request_error" : "server_error"}}}};
}

// Tells whether a client has closed its end of a request's connection. httplib shows a connection only to handlers that
// stream, so it is found by the client's port, once, and asked without taking anything from it.
class Connection {
 public:
  explicit Connection(const httplib::Request& http) {
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      const int fd = std::stoi(entry.path().filename());
      sockaddr_in peer{};
      socklen_t size = sizeof(peer);
      if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) == 0 && peer.sin_family == AF_INET &&
          ntohs(peer.sin_port) == http.remote_port)
        fd_ = fd;
    }
  }

  bool is_closed() const {
    char next;
    const ssize_t count = fd_ < 0 ? 1 : recv(fd_, &next, 1, MSG_PEEK | MSG_DONTWAIT);
    return count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR);
  }

 private:
  int fd_ = -1;
};

const auto dump = [](const json& body) { return body.dump(-1, ' ', false, json::error_handler_t::replace); };

void reply(httplib::Response& response, const json& body, int status = 200) {
  response.status = status;
  response.set_content(dump(body), "application/json");
}

// Writes the next event, if there is one. False when the client has left, which lets go of the generation.
bool stream(Generation& generation, httplib::DataSink& sink) {
  const std::optional<RequestEvent> event = generation.next();
  if (!event || (event->tokens.empty() && event->finish_reason == FinishReason::kRunning)) return sink.is_writable();
  const bool is_end = generation.num_running == 0;
  json choice = {{"token_ids", json::array()}};
  add(*event, choice);
  json body = {{"choices", json::array({choice})}, {"usage", generation.usage()}};
  if (!event->error.empty()) body = error(500, event->error);
  sink.os << "data: " + dump(body) + (is_end ? "\n\ndata: [DONE]\n\n" : "\n\n");
  if (is_end) sink.done();
  return true;
}

void complete(EngineLoop& loop, const httplib::Request& http, httplib::Response& response) try {
  bool is_stream = false;
  const Request request = parse(json::parse(http.body), is_stream);
  const auto generation = std::make_shared<Generation>(loop, request);
  const auto next = [generation](size_t, auto& sink) { return stream(*generation, sink); };
  if (is_stream) return response.set_chunked_content_provider("text/event-stream", next);
  json choices(request.n, {{"token_ids", json::array()}});
  const Connection connection(http);
  while (generation->num_running > 0) {
    if (connection.is_closed()) return;  // nobody is left to answer; the generation ends with this scope
    const std::optional<RequestEvent> event = generation->next();
    if (event && !event->error.empty()) throw std::runtime_error(event->error);
    if (event) add(*event, choices[event->branch]);
  }
  reply(response, {{"choices", choices}, {"usage", generation->usage()}});
} catch (const std::exception& e) {
  const bool is_refusal = dynamic_cast<const xgdn::Error*>(&e) || dynamic_cast<const json::exception*>(&e);
  const int status = dynamic_cast<const xgdn::StoppedError*>(&e) ? 503 : is_refusal ? 400 : 500;
  reply(response, error(status, e.what()), status);
}

int main(int argc, char** argv) try {
  static volatile std::sig_atomic_t is_ended = 0;
  static constexpr int kYes = 1;
  for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { is_ended = 1; });
  if (argc < 2) throw RequestError("expected MODEL [PORT]");
  const std::unique_ptr<xgdn::Engine> engine = xgdn::Engine::load(argv[1]);
  EngineLoop loop(*engine);
  const json models = {{"object", "list"}, {"data", {{{"id", argv[1]}, {"object", "model"}}}}};
  httplib::Server server;
  server.Get("/health", [&](auto&, auto& response) {
    reply(response, {{"status", "ok"}, {"free_slots", loop.counters().num_free_slots}});
  });
  server.Get("/v1/models", [&](auto&, auto& response) { reply(response, models); });
  server.Post("/v1/completions", [&](auto& request, auto& response) { complete(loop, request, response); });
  server.set_error_handler([](auto& request, auto& response) {  // httplib's own errors have no body
    const std::string message = c10::str(request.method, " ", request.path, ": HTTP status ", response.status);
    if (response.body.empty()) reply(response, error(response.status, message), response.status);
  });
  server.new_task_queue = [] { return new httplib::ThreadPool(64); };  // clients that are answered at once
  server.set_payload_max_length(1 << 20).set_tcp_nodelay(true).set_keep_alive_timeout(1);  // an idle one takes a thread
  server.set_socket_options([](int fd) { setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &kYes, sizeof(kYes)); });
  const int wish = argc > 2 ? std::stoi(argv[2]) : 0;
  const int port = wish == 0 ? server.bind_to_any_port(kHost) : server.bind_to_port(kHost, wish) ? wish : -1;
  if (port < 0) throw std::runtime_error(c10::str("cannot listen on port ", wish));
  std::jthread listener([&] { server.listen_after_bind(); });
  dprintf(STDOUT_FILENO, "listening on http://%s:%d\n", kHost, port);
  while (is_ended == 0 || !server.is_running()) std::this_thread::sleep_for(50ms);
  loop.drain(10s);  // takes no more requests; those that take too long are cancelled
  for (int left = Generation::num_open; left > 0; left = Generation::num_open) Generation::num_open.wait(left);
  server.stop();
} catch (const std::exception& error) {
  std::fprintf(stderr, "embed_server: %s\n", error.what());
  return 1;
}
