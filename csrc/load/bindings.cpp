// narsil._load for Python: see src/narsil/_load.pyi.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "load/client.hpp"
#include "load/scores.hpp"
#include "load/target.hpp"

namespace py = pybind11;

namespace narsil::load {
namespace {

constexpr size_t MOST_CONNECTIONS = 1024;
constexpr double LONGEST = 1e6;  // seconds: of a timeout and of a schedule

using Progress = std::optional<std::function<void(uint64_t)>>;

void require(bool holds, const std::string& what) {
  if (!holds) throw py::value_error(what);
}

Wire wire_of(const std::string& name) {
  if (name == "predictor") return Wire::PREDICTOR;
  if (name == "narsil") return Wire::NARSIL;
  require(name == "oip", "wire " + name + " is none of predictor, narsil and oip");
  return Wire::OIP;
}

// A tick that takes the GIL: hears Ctrl-C, and reports progress where that is asked for.
Tick tick_of(const Progress& progress) {
  return [&progress](uint64_t ended) {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals()) throw py::error_already_set();
    if (progress) (*progress)(ended);
  };
}

// Hands a vector to numpy without copying it.
py::array_t<double> to_numpy(std::vector<double> values) {
  auto owned = std::make_unique<std::vector<double>>(std::move(values));
  const py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<double>*>(vector); });
  const std::vector<double>& kept = *owned.release();
  return py::array_t<double>(static_cast<py::ssize_t>(kept.size()), kept.data(), owner);
}

struct Result {
  py::array_t<double> latencies;
  py::dict errors;
  py::dict replies;
  double late_s;
  size_t reconnects;
};

Result to_result(Outcome outcome) {
  py::dict errors;
  for (const auto& [kind, count] : outcome.errors) errors[py::str(kind)] = count;
  py::dict replies;
  for (const auto& [body, reply] : outcome.replies) replies[py::int_(body)] = py::bytes(reply);
  return {to_numpy(std::move(outcome.latencies)), errors, replies, outcome.late, outcome.reconnects};
}

// The client as Python sees it: owns the bodies, and lets one thread in at a time.
class PyClient {
 public:
  PyClient(const std::string& target, const std::string& method, const std::vector<py::bytes>& bodies,
           const std::string& wire, const std::string& task, size_t rows, size_t connections, double timeout_s,
           size_t reconnects, size_t max_reply_bytes, const std::string& user_agent)
      : owned_(bodies) {
    require(!bodies.empty(), "a load needs at least one body");
    require(connections >= 1 && connections <= MOST_CONNECTIONS,
            "connections must be 1 to " + std::to_string(MOST_CONNECTIONS));
    require(timeout_s > 0 && timeout_s <= LONGEST, "timeout_s must be above 0 and at most 1e6");
    require(max_reply_bytes <= UINT32_MAX, "max_reply_bytes must be below 4 GiB");
    Settings settings;
    settings.target = target;
    settings.method = method;
    settings.user_agent = user_agent;
    settings.expected.wire = wire_of(wire);
    settings.expected.task = task;
    settings.expected.rows = rows;
    settings.expected.max_bytes = max_reply_bytes;
    settings.connections = connections;
    settings.timeout = std::max<Nanos>(1, std::llround(timeout_s * 1e9));
    settings.reconnects = reconnects;
    std::vector<Body> framed;
    framed.reserve(bodies.size());
    for (const py::bytes& body : owned_) {
      const std::string_view content = body;
      require(content.size() <= UINT32_MAX, "a body must be below 4 GiB");
      framed.emplace_back(content);
    }
    client_ = std::make_unique<Client>(std::move(settings), std::move(framed));
  }

  void connect() {
    alone([&] { client_->connect(tick_of({})); });
  }

  Result closed_loop(uint64_t requests, size_t concurrency, size_t keep, const Progress& progress) {
    require(concurrency >= 1, "concurrency must be at least 1");
    Outcome outcome;
    alone([&] { outcome = client_->closed_loop(requests, concurrency, keep, tick_of(progress)); });
    return to_result(std::move(outcome));
  }

  Result open_loop(const py::array_t<double, py::array::c_style | py::array::forcecast>& due, size_t keep,
                   const Progress& progress) {
    require(due.ndim() == 1, "due must have one dimension");
    const std::vector<double> times(due.data(), due.data() + due.size());
    double before = 0;
    for (const double time : times) {
      require(time >= before && time <= LONGEST, "due must ascend from 0 to at most 1e6 seconds");
      before = time;
    }
    Outcome outcome;
    alone([&] { outcome = client_->open_loop(times, keep, tick_of(progress)); });
    return to_result(std::move(outcome));
  }

  void close() {
    alone([&] { client_->close(); });
  }

 private:
  template <class Work>
  void alone(const Work& work) {
    if (busy_.exchange(true)) throw std::runtime_error("the client is in use by another call");
    struct Leave {
      std::atomic<bool>& busy;
      ~Leave() { busy = false; }
    } leave{busy_};
    const py::gil_scoped_release released;
    work();
  }

  std::vector<py::bytes> owned_;
  std::atomic<bool> busy_{false};
  std::unique_ptr<Client> client_;
};

}  // namespace
}  // namespace narsil::load

PYBIND11_MODULE(_load, module) {
  using namespace narsil::load;
  module.doc() = "The native load generator: HTTP/2 and gRPC on nghttp2 and epoll, in one thread.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const ConnectFailed& error) {
      PyErr_SetString(PyExc_ConnectionError, error.what());
    }
  });

  module.def(
      "is_target",
      [](const std::string& text) {
        try {
          parse_target(text);
          return true;
        } catch (const std::invalid_argument&) {
          return false;
        }
      },
      py::arg("text"));
  module.def(
      "count_scores",
      [](const std::string& wire, const std::string& task, const py::bytes& message) {
        const auto count = count_scores(wire_of(wire), task, std::string_view(message));
        require(count.has_value(), "the message is no reply of this wire");
        return *count;
      },
      py::arg("wire"), py::arg("task"), py::arg("message"));

  py::class_<Result>(module, "Result", py::is_final())
      .def_readonly("latencies", &Result::latencies)
      .def_readonly("errors", &Result::errors)
      .def_readonly("replies", &Result::replies)
      .def_readonly("late_s", &Result::late_s)
      .def_readonly("reconnects", &Result::reconnects);

  py::class_<PyClient>(module, "Client", py::is_final())
      .def(py::init<const std::string&, const std::string&, const std::vector<py::bytes>&, const std::string&,
                    const std::string&, size_t, size_t, double, size_t, size_t, const std::string&>(),
           py::arg("target"), py::arg("method"), py::arg("bodies"), py::kw_only(), py::arg("wire"), py::arg("task"),
           py::arg("rows"), py::arg("connections") = 1, py::arg("timeout_s") = 30.0, py::arg("reconnects") = 20,
           py::arg("max_reply_bytes") = 4u << 20, py::arg("user_agent") = "narsil-load")
      .def("connect", &PyClient::connect)
      .def("closed_loop", &PyClient::closed_loop, py::arg("requests"), py::arg("concurrency"), py::kw_only(),
           py::arg("keep") = 0, py::arg("on_progress") = py::none())
      .def("open_loop", &PyClient::open_loop, py::arg("due"), py::kw_only(), py::arg("keep") = 0,
           py::arg("on_progress") = py::none())
      .def("close", &PyClient::close);
}
