// The native data plane: listens, and lets whoever is idle poll the network.
//
// There is no I/O thread. Threads that have nothing else to do call `poll`; the kernel wakes one of them when something
// arrives, the last to come first, and it processes what there is and leaves with whole requests. Answers are left in
// an outbox by any thread and sent by `flush`. While nobody polls because all are busy, one more thread, which spends
// its life in `attend`, looks after the connections every few milliseconds, so that pings, window updates,
// cancellations, health checks and refusals do not wait.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "native/decode.hpp"
#include "native/poller.hpp"
#include "native/session.hpp"

namespace narsil::native {

// A whole request, for whoever answers it.
struct Arrival {
  RpcPtr rpc;
  std::shared_ptr<Buffer> message;
  Decoded decoded;  // of a scoring call; its spans point into the message
};

// What polling yields. The last one to know of a model may be one of these: where that matters to a model's owner, they
// are let go of with care.
struct Arrivals {
  std::vector<Arrival> calls;
  std::vector<uint64_t> gone;              // ids of calls handed out before whose clients have gone away since
  std::shared_ptr<const ModelSet> models;  // that the calls were decoded against
};

class Plane {
 public:
  explicit Plane(Config config);
  ~Plane();
  Plane(const Plane&) = delete;
  Plane& operator=(const Plane&) = delete;

  // From now on calls that are taken are decoded against these models. Returns the set before.
  std::shared_ptr<const ModelSet> serve(std::shared_ptr<const ModelSet> models);

  // Binds and listens; returns the port. `reuse_port` shares it with other processes that say so too. Throws
  // std::system_error.
  int listen_tcp(const std::string& host, int port, bool reuse_port);
  void listen_unix(const std::string& path);

  // Processes the network for at most `timeout` seconds, until something arrives or somebody calls `wake`. Any thread,
  // any number of them.
  Arrivals poll(double timeout);

  // Looks after the network, and after timeouts, while nobody polls. Returns with what has arrived; with nothing once
  // the plane has stopped. One thread.
  Arrivals attend();

  // Makes one running `poll`, or the next, return soon.
  void wake() { poller_.wake(); }

  // Leaves a call's answer for the next flush. Each call handed out is posted once; any thread.
  void post(RpcPtr rpc);

  // Sends what has been posted.
  void flush();

  // From now on health checks are told NOT_SERVING, watchers are told and their calls end.
  void retire();

  // Scoring calls that come are refused with UNAVAILABLE and this text.
  void refuse(const std::string& why);

  // Accepts nothing more, tells peers to open no more streams, waits at most `grace` seconds for calls to end, closes.
  void stop(double grace);

  Statistics statistics();

 private:
  struct Connection;

  void add_listeners(std::vector<wire::Descriptor> added);
  void accept_all();
  void add_connection(wire::Descriptor socket);
  void read_later(Connection& connection);
  void read(Connection& connection);
  bool write(Connection& connection);
  void doom(Connection& connection);
  void bury();
  void send_posted();
  void tend();
  void send_away(bool last_word);
  bool busy() const;
  bool arrived() const;
  Arrivals take();
  void handle(const epoll_event* events, int count, bool& woken);

  Poller poller_;
  Shared shared_;
  std::shared_ptr<const ModelSet> models_ = std::make_shared<const ModelSet>();  // never null
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  std::vector<uint64_t> unread_;  // connections whose socket may still hold bytes
  std::vector<uint64_t> doomed_;
  std::vector<wire::Descriptor> listeners_;
  std::string unix_path_;
  uint64_t next_id_;
  wire::Descriptor spare_;
  int waiting_ = 0;    // threads inside the kernel's wait
  double polled_ = 0;  // when a thread last looked at the network
  double tended_ = 0;
  bool stopped_ = false;
  std::vector<uint8_t> scratch_;
  std::atomic<uint64_t> decoded_{0};

  std::mutex outbox_mutex_;
  std::vector<RpcPtr> outbox_;

  std::condition_variable attendant_;
};

}  // namespace narsil::native
