// Fuzzes one connection: bytes from a peer in any pieces, answers of any kind to the calls that come out.
//
// Input: commands. A byte below 0xE0 feeds so many of the bytes that follow it, in one piece; the others answer, fail
// or drop a call, let time pass, tell watchers, refuse, or end the connection; see below. The client's preface is sent
// first.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "fuzz/require.hpp"
#include "native/decode.hpp"
#include "native/session.hpp"

using namespace narsil::native;
namespace wire = narsil::wire;

namespace {

Config config() {
  Config made;
  made.max_message = 1000;
  made.max_buffered = 5000;
  made.max_streams = 8;
  made.max_watchers = 2;
  made.max_metadata = 600;
  made.max_resets_per_second = 1;
  const std::pair<const char*, Kind> methods[] = {{"/p", Kind::PREDICTOR},          {"/n", Kind::NARSIL},
                                                  {"/u.U/u", Kind::UNARY},          {"/s", Kind::STREAM},
                                                  {"/h/Check", Kind::HEALTH_CHECK}, {"/h/Watch", Kind::HEALTH_WATCH}};
  for (const auto& [path, kind] : methods) made.methods[path] = {path, kind};
  return made;
}

const ModelSet MODELS({std::make_shared<const Model>(Model{
                          "fake", "1", {3, {}, {50, 7, 1000, 20}, {0, 0, 0, 0}, false, 60, 2000}, {}, {}})},
                      0);

struct Loop {
  Shared shared;
  std::unique_ptr<Session> session;
  std::vector<RpcPtr> taken;
  std::vector<uint64_t> gone;
  bool over = false;

  Loop() {
    shared.config = config();
    shared.now = 1;
    session = std::make_unique<Session>(shared);
  }

  // What the plane does after every piece.
  void turn() {
    std::string out;
    if (session && (!session->pull(out, 1 << 16) || session->done())) end();
    REQUIRE(out.size() < 1 << 18);
    gone.insert(gone.end(), shared.gone.begin(), shared.gone.end());
    shared.gone.clear();
    for (RpcPtr& call : shared.ready) {
      if (call->cancelled) {
        REQUIRE(!call->charged);
        continue;
      }
      const std::shared_ptr<Buffer> request = std::move(call->request);
      const size_t size = std::min(call->charged, request->size());
      shared.buffered -= size;
      call->charged -= size;
      call->custody = Custody::TAKEN;
      REQUIRE(request->size() <= shared.config.max_message);
      REQUIRE(call->model.name.size() + call->model.version.size() <= shared.config.max_metadata);
      if (call->method->kind == Kind::PREDICTOR)
        decode_predictor(request->data(), request->size(), MODELS, call->model);
      if (call->method->kind == Kind::NARSIL) decode_narsil(request->data(), request->size(), MODELS, call->model);
      taken.push_back(std::move(call));
    }
    shared.ready.clear();
    REQUIRE(!session || session->watchers() <= shared.config.max_watchers);
    REQUIRE(shared.buffered < 16u << 20);  // eight streams, each with all the messages that may wait answered at length
  }

  void feed(const uint8_t* data, size_t size) {
    if (!session) return;
    const std::vector<uint8_t> piece(data, data + size);
    if (!session->feed(piece.data(), piece.size())) {
      std::string out;
      session->pull(out, 1 << 16);
      end();
    }
    turn();
  }

  void end() { session.reset(); }

  // Answers or fails the call at this place, as an answering thread and the flush after it do.
  void answer(size_t place, int status, size_t size) {
    if (taken.empty()) return;
    const RpcPtr call = taken[place % taken.size()];
    taken.erase(taken.begin() + static_cast<ptrdiff_t>(place % taken.size()));
    if (call->answered.exchange(true)) return;
    if (status) {
      call->answer_status = status;
      call->answer_message.assign(size, static_cast<char>(status));
    } else {
      wire::put_prefix(call->answer, size);
      call->answer.append(size, 'x');
    }
    if (call->session) call->session->answer(call);
    turn();
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const char PREFACE[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";  // and a frame of no settings
  Loop loop;
  loop.turn();
  loop.feed(reinterpret_cast<const uint8_t*>(PREFACE), sizeof PREFACE);
  const uint8_t* const end = data + size;
  while (data < end && loop.session) {
    const uint8_t command = *data++;
    const size_t left = static_cast<size_t>(end - data), argument = left ? *data : 0;
    if (command < 0xE0) {
      const size_t count = std::min<size_t>(command, left);
      loop.feed(data, count);
      data += count;
      continue;
    }
    switch (command) {
      case 0xE0:
        loop.answer(argument, 0, argument);
        break;
      case 0xE1:
        loop.answer(argument, 0, 70'000);
        break;  // more than a window
      case 0xE2:
        loop.answer(argument, 1 + static_cast<int>(argument) % 16, argument * 40);
        break;
      case 0xE3:
        loop.shared.now += 0.01;
        break;
      case 0xE4:
        loop.shared.now += 61;
        loop.session->expire_stalled();
        break;
      case 0xE5:
        loop.session->ping();
        break;
      case 0xE6:
        loop.session->go_away(false);
        break;
      case 0xE7:
        loop.session->go_away(true);
        break;
      case 0xE8:
        loop.shared.serving = false;
        loop.session->tell_watchers();
        break;
      case 0xE9:
        loop.shared.refusal = "no more";
        break;
      case 0xEA:
        if (!loop.taken.empty()) loop.taken.pop_back();
        break;  // nobody answers it
      case 0xEB:
        loop.end();
        break;
      default:
        break;
    }
    loop.turn();
  }
  loop.end();
  loop.turn();
  while (!loop.taken.empty()) loop.answer(0, 0, 3);  // too late
  REQUIRE(loop.shared.buffered == 0);
  std::sort(loop.gone.begin(), loop.gone.end());
  REQUIRE(std::adjacent_find(loop.gone.begin(), loop.gone.end()) == loop.gone.end());
  return 0;
}
