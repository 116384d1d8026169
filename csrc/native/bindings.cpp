// The data plane's face in Python; src/narsil/_native.pyi documents it. Nothing here waits while it holds the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <system_error>

#include "native/collate.hpp"
#include "native/encode.hpp"
#include "native/plane.hpp"
#include "native/signals.hpp"

namespace py = pybind11;

namespace narsil::native {
namespace {

// A model, and what it is in Python. Everything here that may be the last to hold one holds the GIL when it lets go;
// the destructor takes it for what is left, an exception that unwinds a poll.
struct PyModel : Model {
  PyModel(Model model, py::object served) : Model(std::move(model)), served(std::move(served)) {}
  PyModel(const PyModel&) = delete;
  PyModel& operator=(const PyModel&) = delete;
  ~PyModel() {
    const py::gil_scoped_acquire held;
    served.release().dec_ref();
  }

  py::object served;
};

// A call as Python holds it: with the plane that it is answered through.
struct PyCall {
  Arrival arrival;
  std::shared_ptr<Plane> plane;

  Rpc& rpc() const { return *arrival.rpc; }
  const Decoded& decoded() const { return arrival.decoded; }
  bool is_decoded() const { return decoded().model != nullptr; }

  // True for the first answer alone.
  bool claim() const { return !rpc().answered.exchange(true); }
};

// What peers sent as text need not be any.
py::str text_of(const std::string& bytes) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "replace"));
}

py::object served_of(const PyCall& self) {
  if (!self.is_decoded()) return py::none();
  return static_cast<const PyModel&>(*self.decoded().model).served;
}

py::bytes body_of(const PyCall& self) {
  const Buffer& message = *self.arrival.message;
  return py::bytes(reinterpret_cast<const char*>(message.data()), message.size());
}

// A read-only array over a span of the message or of what was copied of it, which it keeps alive.
py::object view(const PyCall& self, const char* kind, const uint8_t* data, std::vector<py::ssize_t> shape) {
  using Keeper = std::pair<std::shared_ptr<Buffer>, std::shared_ptr<uint8_t[]>>;
  auto* const keeper = new Keeper(self.arrival.message, self.decoded().own);
  const py::capsule owner(keeper, [](void* pointer) { delete static_cast<Keeper*>(pointer); });
  py::array array(py::dtype(kind), std::move(shape), {}, data, owner);
  array.attr("setflags")(py::arg("write") = false);
  return std::move(array);
}

py::tuple arrays_of(const PyCall& self) {
  if (!self.is_decoded()) throw py::value_error("the message was not decoded");
  const Decoded& found = self.decoded();
  const Schema& schema = found.model->schema;
  const py::ssize_t rows = found.rows, features = schema.features();
  const std::vector<py::ssize_t> bags =
      found.key_major ? std::vector<py::ssize_t>{features, rows} : std::vector<py::ssize_t>{rows, features};
  const char* const kind = found.wide ? "<i8" : "<i4";
  return py::make_tuple(view(self, "<f4", found.dense, {rows, schema.dense_dim}),
                        view(self, kind, found.values, {found.ids}),
                        found.one_hot ? py::object(py::none()) : view(self, "<i4", found.lengths, bags));
}

void answer(const PyCall& self, std::string framed) {
  if (!self.claim()) return;
  self.rpc().answer = std::move(framed);
  self.plane->post(self.arrival.rpc);
}

// Those that the call asks for, in its order; all where it asks for none.
std::vector<TaskScores> asked_for(const PyCall& self, std::vector<TaskScores> tasks) {
  const Decoded& found = self.decoded();
  if (found.outputs.empty()) return tasks;
  std::vector<TaskScores> picked;
  for (const uint32_t place : found.outputs) {
    const std::string& name = found.model->tasks[place];
    const auto task =
        std::find_if(tasks.begin(), tasks.end(), [&](const TaskScores& each) { return each.task == name; });
    if (task == tasks.end()) throw py::value_error("no scores of the task " + name);
    picked.push_back(*task);
  }
  return picked;
}

std::string encoded(const PyCall& self, const std::vector<TaskScores>& tasks, const Provenance& provenance) {
  const Model& model = *self.decoded().model;
  const std::string& request_id = self.decoded().request_id;
  switch (self.rpc().method->kind) {
    case Kind::PREDICTOR:
      return encode_predictor(tasks);
    case Kind::OIP:
      return encode_oip(asked_for(self, tasks), model, request_id);
    default:
      return encode_narsil(tasks, model, request_id, provenance);
  }
}

void answer_scores(const PyCall& self, const py::dict& scores, uint64_t requests, uint64_t rows, double queue_s,
                   double execute_s) {
  if (!self.is_decoded()) throw py::value_error("the message was not decoded");
  std::vector<TaskScores> tasks;
  std::vector<py::array> kept;  // what a backend gives in another type or layout is copied, and the copy has to live
  for (const auto& item : scores) {
    auto array = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(item.second);
    if (!array || array.ndim() < 1 || array.ndim() > 2) throw py::value_error("scores are (B,) or (B, k) float32");
    tasks.push_back({py::cast<std::string>(item.first), reinterpret_cast<const uint8_t*>(array.data()),
                     static_cast<size_t>(array.size()), array.ndim() == 2 ? static_cast<size_t>(array.shape(1)) : 0});
    kept.push_back(std::move(array));
  }
  const auto microseconds = [](double seconds) { return seconds > 0 ? static_cast<uint64_t>(seconds * 1e6) : 0; };
  answer(self, encoded(self, tasks, {requests, rows, microseconds(queue_s), microseconds(execute_s)}));
}

void answer_bytes(const PyCall& self, const py::bytes& message) {
  char* data;
  py::ssize_t size;
  if (PyBytes_AsStringAndSize(message.ptr(), &data, &size)) throw py::error_already_set();
  std::string framed;
  framed.reserve(wire::PREFIX_SIZE + static_cast<size_t>(size));
  wire::put_prefix(framed, static_cast<size_t>(size));
  framed.append(data, static_cast<size_t>(size));
  answer(self, std::move(framed));
}

void fail(const PyCall& self, int status, std::string message) {
  if (!self.claim()) return;
  self.rpc().answer_status = status;
  self.rpc().answer_message = std::move(message);
  self.plane->post(self.arrival.rpc);
}

template <class T>
T* data_of(py::array& array, size_t needed, const char* name) {
  if (!array.writeable() || !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + " must be writeable and contiguous");
  if (static_cast<size_t>(array.size()) < needed) throw py::value_error(std::string(name) + " is too short");
  return static_cast<T*>(array.mutable_data());
}

void collate_into(const std::vector<const PyCall*>& calls, int64_t rows, py::array_t<float> dense, py::array values,
                  const py::object& lengths) {
  if (calls.empty()) throw py::value_error("no calls");
  const ModelPtr model = calls.front()->decoded().model;
  std::vector<const Decoded*> parts;
  int64_t own = 0, ids = 0;
  bool one_hot = true;
  for (const PyCall* call : calls) {
    const Decoded& found = call->decoded();
    if (!found.model) throw py::value_error("a call was not decoded");
    if (found.model != model) throw py::value_error("the calls are of different models");
    parts.push_back(&found);
    own += found.rows;
    ids += found.ids;
    one_hot = one_hot && found.one_hot;
  }
  const Schema& schema = model->schema;
  if (own > rows) throw py::value_error("fewer rows than the calls have");
  if (rows > INT32_MAX / schema.features())
    throw py::value_error("dense is too short: nobody has room for so many rows");
  if (one_hot != lengths.is_none()) throw py::value_error("lengths are for jagged batches, and for all of them");
  if (values.dtype().itemsize() != (schema.wide_ids ? 8 : 4) || values.dtype().kind() != 'i')
    throw py::value_error("values have another type than the schema's ids");
  const size_t bags = static_cast<size_t>(rows * schema.features());
  Tensors tensors{};
  tensors.dense = data_of<float>(dense, static_cast<size_t>(rows * schema.dense_dim), "dense");
  tensors.values = data_of<void>(values, one_hot ? bags : static_cast<size_t>(ids), "values");
  if (!one_hot) {
    auto array = py::cast<py::array_t<int32_t>>(lengths);
    tensors.lengths = data_of<int32_t>(array, bags, "lengths");
  }
  const py::gil_scoped_release release;
  collate(parts, rows, schema, tensors);
}

std::shared_ptr<PyModel> make_model(py::object served, std::string name, std::string version, int64_t dense_dim,
                                    const std::vector<int64_t>& nan_columns, std::vector<int64_t> rows,
                                    std::vector<int64_t> least, bool wide_ids, int64_t max_rows, int64_t max_ids,
                                    const std::vector<std::string>& features, std::vector<std::string> tasks) {
  for (const int64_t limit : rows)
    if (limit < 1) throw py::value_error("a table has at least one row");
  if (least.size() != rows.size() || std::any_of(least.begin(), least.end(), [](int64_t id) { return id > 0; }))
    throw py::value_error("each feature has a least id, of at most 0");
  if (dense_dim < 0 || max_rows < 0) throw py::value_error("no schema");
  if (!features.empty() && features.size() != rows.size()) throw py::value_error("a name for each feature, or none");
  std::vector<uint8_t> takes_nan(nan_columns.empty() ? 0 : static_cast<size_t>(dense_dim));
  for (const int64_t column : nan_columns) {
    if (column < 0 || column >= dense_dim) throw py::value_error("a column in which NaN is a value is none");
    takes_nan[static_cast<size_t>(column)] = 1;
  }
  Model model{std::move(name),
              std::move(version),
              {dense_dim, std::move(takes_nan), std::move(rows), std::move(least), wide_ids, max_rows, max_ids},
              Places(features),
              std::move(tasks)};
  return std::make_shared<PyModel>(std::move(model), std::move(served));
}

std::shared_ptr<Plane> make_plane(const py::dict& methods, const py::dict& limits) {
  static const std::unordered_map<std::string, Kind> kinds = {{"predictor", Kind::PREDICTOR},
                                                              {"narsil", Kind::NARSIL},
                                                              {"oip", Kind::OIP},
                                                              {"scores", Kind::SCORES},
                                                              {"unary", Kind::UNARY},
                                                              {"stream", Kind::STREAM},
                                                              {"health_check", Kind::HEALTH_CHECK},
                                                              {"health_watch", Kind::HEALTH_WATCH}};
  Config config;
  for (const auto& item : methods) {
    const auto path = py::cast<std::string>(item.first);
    config.methods[path] = {path, kinds.at(py::cast<std::string>(item.second))};
  }
  const std::unordered_map<std::string, size_t*> counts = {{"max_message", &config.max_message},
                                                           {"max_buffered", &config.max_buffered},
                                                           {"max_streams", &config.max_streams},
                                                           {"max_connections", &config.max_connections},
                                                           {"max_watchers", &config.max_watchers},
                                                           {"max_metadata", &config.max_metadata},
                                                           {"max_resets_per_second", &config.max_resets_per_second}};
  const std::unordered_map<std::string, double*> seconds = {{"handshake_s", &config.handshake_s},
                                                            {"stall_s", &config.stall_s},
                                                            {"idle_s", &config.idle_s},
                                                            {"keepalive_s", &config.keepalive_s},
                                                            {"keepalive_timeout_s", &config.keepalive_timeout_s},
                                                            {"drain_s", &config.drain_s},
                                                            {"helper_s", &config.helper_s}};
  for (const auto& item : limits) {
    const auto name = py::cast<std::string>(item.first);
    if (counts.count(name)) {
      *counts.at(name) = py::cast<size_t>(item.second);
    } else if (seconds.count(name)) {
      *seconds.at(name) = py::cast<double>(item.second);
    } else {
      throw py::value_error("no such limit: " + name);
    }
  }
  return std::make_shared<Plane>(std::move(config));
}

using RouteParts = std::vector<std::pair<size_t, double>>;  // place of a model, its share

void serve(Plane& self, const std::vector<std::shared_ptr<PyModel>>& models, size_t fallback,
           const std::vector<std::tuple<std::string, std::string, RouteParts>>& routes) {
  if (fallback >= models.size() && !models.empty()) throw py::value_error("default is the place of no model");
  for (size_t i = 0; i < models.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      if (models[i]->name == models[j]->name && models[i]->version == models[j]->version)
        throw py::value_error("two models are " + models[i]->name + ", version " + models[i]->version);
  std::vector<std::unique_ptr<const Route>> made;
  for (const auto& [name, version, parts] : routes) {
    std::vector<std::pair<ModelPtr, double>> found;
    for (const auto& [place, share] : parts) {
      if (place >= models.size()) throw py::value_error("a route to the place of no model");
      if (!(share > 0 && std::isfinite(share))) throw py::value_error("a route's shares are above 0");
      found.emplace_back(models[place], share);
    }
    if (found.empty()) throw py::value_error("a route leads nowhere");
    made.push_back(std::make_unique<const Route>(name, version, std::move(found)));
  }
  auto set =
      std::make_shared<const ModelSet>(std::vector<ModelPtr>(models.begin(), models.end()), fallback, std::move(made));
  const py::gil_scoped_release release;
  set = self.serve(std::move(set));
}

// Runs `get` without the GIL. What it arrives with is let go of with the GIL: models may be in it.
template <class Get>
py::tuple arrivals_of(const std::shared_ptr<Plane>& plane, Get get) {
  Arrivals arrivals;
  {
    const py::gil_scoped_release release;
    arrivals = get();
  }
  py::list calls(arrivals.calls.size());
  for (size_t i = 0; i < arrivals.calls.size(); ++i) {
    calls[i] = py::cast(PyCall{std::move(arrivals.calls[i]), plane});
  }
  return py::make_tuple(calls, py::cast(arrivals.gone));
}

py::dict statistics_of(Plane& self) {
  Statistics found;
  {
    const py::gil_scoped_release release;
    found = self.statistics();
  }
  using namespace py::literals;
  return py::dict("connections"_a = found.connections, "connections_refused"_a = found.connections_refused,
                  "connections_timed_out"_a = found.connections_timed_out, "calls"_a = found.calls,
                  "answered"_a = found.answered, "refused"_a = found.refused, "cancelled"_a = found.cancelled,
                  "reset_floods"_a = found.reset_floods, "header_floods"_a = found.header_floods,
                  "messages"_a = found.messages, "decoded"_a = found.decoded, "bytes_in"_a = found.bytes_in,
                  "bytes_out"_a = found.bytes_out, "helper_polls"_a = found.helper_polls,
                  "open_connections"_a = found.open_connections, "open_calls"_a = found.open_calls,
                  "watchers"_a = found.watchers, "buffered"_a = found.buffered);
}

}  // namespace
}  // namespace narsil::native

PYBIND11_MODULE(_native, module) {
  using namespace narsil::native;
  module.doc() = "The native data plane: HTTP/2, gRPC, decoding, collation and encoding.";

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  py::class_<PyCall>(module, "Call")
      .def_property_readonly("id", [](const PyCall& self) { return self.rpc().id; })
      .def_property_readonly("method", [](const PyCall& self) { return self.rpc().method->path; })
      .def_property_readonly("arrived", [](const PyCall& self) { return self.rpc().arrived; })
      .def_property_readonly("deadline",
                             [](const PyCall& self) -> py::object {
                               if (self.rpc().deadline == NEVER) return py::none();
                               return py::float_(self.rpc().deadline);
                             })
      .def_property_readonly("size",
                             [](const PyCall& self) { return self.arrival.message->size() + self.decoded().own_size; })
      .def_property_readonly("body", body_of)
      .def_property_readonly("decoded", [](const PyCall& self) { return self.is_decoded(); })
      .def_property_readonly("rows", [](const PyCall& self) { return self.decoded().rows; })
      .def_property_readonly("ids", [](const PyCall& self) { return self.decoded().ids; })
      .def_property_readonly("one_hot", [](const PyCall& self) { return self.decoded().one_hot; })
      .def_property_readonly("key_major", [](const PyCall& self) { return self.decoded().key_major; })
      .def_property_readonly("cancelled", [](const PyCall& self) { return self.rpc().cancelled.load(); })
      .def_property_readonly("served", served_of)
      .def_property_readonly("model_name", [](const PyCall& self) { return text_of(self.rpc().model.name); })
      .def_property_readonly("model_version", [](const PyCall& self) { return text_of(self.rpc().model.version); })
      .def("arrays", arrays_of)
      .def("answer_scores", answer_scores)
      .def("answer", answer_bytes)
      .def("fail", fail);

  py::class_<PyModel, std::shared_ptr<PyModel>>(module, "Model")
      .def(py::init(&make_model), py::arg("served"), py::kw_only(), py::arg("name"), py::arg("version"),
           py::arg("dense_dim"), py::arg("nan_columns"), py::arg("rows"), py::arg("least"), py::arg("wide_ids"),
           py::arg("max_rows"), py::arg("max_ids"), py::arg("features") = py::tuple(), py::arg("tasks") = py::tuple())
      .def_readonly("served", &PyModel::served);

  py::class_<Plane, std::shared_ptr<Plane>>(module, "Plane")
      .def(py::init(&make_plane), py::arg("methods"), py::arg("limits") = py::dict())
      .def("serve", serve, py::arg("models"), py::arg("default") = 0,
           py::arg("routes") = std::vector<std::tuple<std::string, std::string, RouteParts>>{})
      .def(
          "listen_tcp",
          [](Plane& self, const std::string& host, int port, bool reuse_port) {
            const py::gil_scoped_release release;
            return self.listen_tcp(host, port, reuse_port);
          },
          py::arg("host"), py::arg("port"), py::arg("reuse_port") = false)
      .def("listen_unix",
           [](Plane& self, const std::string& path) {
             const py::gil_scoped_release release;
             self.listen_unix(path);
           })
      .def("poll",
           [](const std::shared_ptr<Plane>& self, const py::object& timeout) {
             const double seconds = timeout.is_none() ? NEVER : py::cast<double>(timeout);
             return arrivals_of(self, [&] { return self->poll(seconds); });
           })
      .def("attend",
           [](const std::shared_ptr<Plane>& self) { return arrivals_of(self, [&] { return self->attend(); }); })
      .def("wake", [](Plane& self) { self.wake(); })
      .def("flush",
           [](Plane& self) {
             const py::gil_scoped_release release;
             self.flush();
           })
      .def("retire",
           [](Plane& self) {
             const py::gil_scoped_release release;
             self.retire();
           })
      .def("refuse",
           [](Plane& self, const std::string& why) {
             const py::gil_scoped_release release;
             self.refuse(why);
           })
      .def("stop",
           [](Plane& self, double grace) {
             const py::gil_scoped_release release;
             self.stop(grace);
           })
      .def("statistics", statistics_of);

  module.def("collate", collate_into, py::arg("calls"), py::arg("rows"), py::arg("dense"), py::arg("values"),
             py::arg("lengths"));
  module.def("end_on_signal", [](int number, const std::string& last_words) {
    if (!narsil::end_on_signal(number, last_words)) throw std::system_error(errno, std::generic_category());
  });
}
