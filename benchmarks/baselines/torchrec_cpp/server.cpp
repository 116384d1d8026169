// The baseline: a synchronous gRPC server over one TorchScript artifact, as TorchRec's example server is built.
//
// Receives predictor.Predictor/Predict, runs one forward per request on the gRPC thread that received it, and
// answers with one FloatVec per task. Nothing is queued, coalesced or checked beyond the byte counts.
// T features, D dense columns, B rows.

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/resource_quota.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <torch/script.h>

#include <charconv>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <semaphore>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "predictor.grpc.pb.h"

namespace {

using Features = c10::Dict<std::string, at::Tensor>;

constexpr int kUnlimited = 1 << 20;  // more concurrent forwards than gRPC will ever hand us
constexpr std::chrono::seconds kDrainTime{10};

constexpr std::string_view kNoModel = "none";  // instead of a path: the first dense value is the score

struct Options {
  std::string model;
  std::string host = "127.0.0.1";
  int port = 0;
  std::string device = "cpu";
  std::string fbgemm_dir = DEFAULT_FBGEMM_DIR;
  int threads = 1;                  // intra-op threads of one forward
  int max_concurrent_forwards = 0;  // 0: as many as there are requests
  int max_handler_threads = 0;      // 0: gRPC's own default; beyond it gRPC answers RESOURCE_EXHAUSTED
  int completion_queues = 1;
  int min_pollers = 1;
  // A gRPC thread ends after its request when this many already poll. At gRPC's default of 2, threads are then made
  // and ended all the time, each with OpenMP's state and an allocator's arena of its own.
  int max_pollers = 16;
  int warmup_rows = 100;
};

constexpr std::string_view kUsage =
    "usage: torchrec_cpp_server --model PATH|none [--host 127.0.0.1] [--port 0] [--device cpu|cuda[:N]] [--threads 1]\n"
    "  [--max-concurrent-forwards 0] [--max-handler-threads 0] [--completion-queues 1] [--min-pollers 1]\n"
    "  [--max-pollers 16] [--warmup-rows 100] [--fbgemm-dir DIR]\n";

int ParseInt(std::string_view name, std::string_view text, int minimum) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < minimum) {
    throw std::invalid_argument(std::string(name) + " takes an integer of at least " + std::to_string(minimum) +
                                ", not '" + std::string(text) + "'");
  }
  return value;
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  const std::pair<std::string_view, std::string*> texts[] = {
      {"--model", &options.model},
      {"--host", &options.host},
      {"--device", &options.device},
      {"--fbgemm-dir", &options.fbgemm_dir},
  };
  struct Number {
    std::string_view name;
    int* value;
    int minimum;
  };
  const Number numbers[] = {
      {"--port", &options.port, 0},
      {"--threads", &options.threads, 1},
      {"--max-concurrent-forwards", &options.max_concurrent_forwards, 0},
      {"--max-handler-threads", &options.max_handler_threads, 0},
      {"--completion-queues", &options.completion_queues, 1},
      {"--min-pollers", &options.min_pollers, 1},
      {"--max-pollers", &options.max_pollers, 1},
      {"--warmup-rows", &options.warmup_rows, 0},
  };
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(std::string(name) + " needs a value");
    bool known = false;
    for (const auto& [option, target] : texts) {
      if (name == option) {
        *target = argv[i + 1];
        known = true;
      }
    }
    for (const auto& number : numbers) {
      if (name == number.name) {
        *number.value = ParseInt(name, argv[i + 1], number.minimum);
        known = true;
      }
    }
    if (!known) throw std::invalid_argument("unknown option " + std::string(name));
  }
  if (options.model.empty()) throw std::invalid_argument("--model is required");
  if (options.min_pollers > options.max_pollers) {
    throw std::invalid_argument("--min-pollers is greater than --max-pollers");
  }
  return options;
}

// Keeps a forward's tensors in the heap. At glibc's defaults the larger ones are mapped and unmapped, and the heap's
// top is given back, so that every forward faults its pages in again.
void KeepMemory() {
  constexpr int kMiB = 1 << 20;
  mallopt(M_MMAP_THRESHOLD, 32 * kMiB);  // the greatest that glibc takes
  mallopt(M_TRIM_THRESHOLD, 256 * kMiB);
  mallopt(M_TOP_PAD, 16 * kMiB);
}

// Registers FBGEMM's operators, which the artifact names. The libraries use each other's symbols without declaring
// all of them, hence the order and RTLD_GLOBAL. Releases differ in what they ship: an absent file is passed over,
// and an operator that is missing for it is named when the artifact is loaded.
void LoadFbgemmOperators(const std::filesystem::path& folder) {
  constexpr const char* kParts[] = {
      "config",        "tbe_utils",           "tbe_index_select",      "tbe_common", "tbe_cache", "tbe_optimizers",
      "tbe_inference", "sparse_async_cumsum", "embedding_inplace_ops", "py",
  };
  for (const char* part : kParts) {
    const auto library = folder / ("fbgemm_gpu_" + std::string(part) + ".so");
    if (!std::filesystem::exists(library)) continue;
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw std::runtime_error("cannot load FBGEMM's operators: " + std::string(dlerror()));
    }
  }
}

// The intra-op thread count is a property of the calling thread (OpenMP's), and gRPC makes its threads itself.
void SetThreadsOnce(int threads) {
  thread_local bool is_set = false;
  if (is_set) return;
  at::set_num_threads(threads);
  is_set = true;
}

// A tensor over the request's own bytes. Protobuf keeps them in a std::string, whose heap block is aligned for any
// scalar; the copy is for a string short enough to live inside its object, should that ever be placed oddly.
template <typename T>
at::Tensor View(const std::string& bytes, at::IntArrayRef shape) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  // from_blob takes a mutable pointer; the forward only reads its inputs.
  auto tensor = at::from_blob(const_cast<char*>(bytes.data()), shape, at::TensorOptions(type));
  return reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(T) == 0 ? tensor : tensor.clone();
}

class Model {
 public:
  Model(const Options& options)
      : device_(options.device),
        module_(LoadModule(options.model, device_)),
        forward_(module_.get_method("forward")),
        threads_(options.threads),
        free_slots_(options.max_concurrent_forwards > 0 ? options.max_concurrent_forwards : kUnlimited) {}

  // One forward. Returns Dict[str, Tensor], by task: (B,) float32, contiguous, on the host.
  std::vector<std::pair<std::string, at::Tensor>> Predict(Features features) {
    SetThreadsOnce(threads_);
    // Guards are per thread: one in main would not reach the threads that gRPC makes.
    const c10::InferenceMode guard;
    if (!device_.is_cpu()) {
      for (const auto& item : features) item.setValue(item.value().to(device_));
    }
    free_slots_.acquire();
    const auto release = [this](void*) { free_slots_.release(); };
    const std::unique_ptr<void, decltype(release)> slot(this, release);
    const auto result = forward_({std::move(features)}).toGenericDict();
    std::vector<std::pair<std::string, at::Tensor>> scores;
    scores.reserve(result.size());
    for (const auto& item : result) {
      scores.emplace_back(item.key().toStringRef(), item.value().toTensor().to(at::kCPU, at::kFloat).contiguous());
    }
    return scores;
  }

  // Runs forwards of `rows` rows until TorchScript's profiling and FBGEMM's code generation are behind us.
  void WarmUp(int rows) {
    const auto dense_columns = DenseColumns();
    const auto features = SparseFeatureCount();
    if (!dense_columns || !features) {
      std::cerr << "no warmup: the artifact does not tell its feature counts\n";
      return;
    }
    constexpr int kForwards = 20;
    for (int i = 0; i < kForwards; ++i) {
      Features inputs;
      inputs.insert("float_features", at::zeros({rows, *dense_columns}, at::kFloat));
      inputs.insert("id_list_features.lengths", at::ones({*features * rows}, at::kInt));
      inputs.insert("id_list_features.values", at::zeros({*features * rows}, at::kInt));
      Predict(std::move(inputs));
    }
  }

 private:
  static torch::jit::Module LoadModule(const std::string& path, const at::Device& device) {
    auto module = torch::jit::load(path, device);
    module.eval();
    return module;
  }

  std::optional<std::int64_t> DenseColumns() const {
    for (const auto& parameter : module_.named_parameters()) {
      if (parameter.name.ends_with("dense_arch.model._mlp.0._linear.weight")) return parameter.value.size(1);
    }
    return std::nullopt;
  }

  std::optional<std::int64_t> SparseFeatureCount() const {
    std::int64_t count = 0;
    for (const auto& submodule : module_.modules()) {
      if (!submodule.hasattr("feature_names_per_table")) continue;
      for (const auto& names : submodule.attr("feature_names_per_table").toListRef()) {
        count += static_cast<std::int64_t>(names.toListRef().size());
      }
    }
    return count > 0 ? std::optional(count) : std::nullopt;
  }

  at::Device device_;
  torch::jit::Module module_;
  torch::jit::Method forward_;
  int threads_;
  std::counting_semaphore<kUnlimited> free_slots_;
};

// torch's errors carry a C++ stack, which tells a caller nothing.
std::string Describe(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  return from_torch != nullptr ? from_torch->what_without_backtrace() : error.what();
}

grpc::Status InvalidArgument(std::string message) { return {grpc::StatusCode::INVALID_ARGUMENT, std::move(message)}; }

class PredictorService final : public predictor::Predictor::Service {
 public:
  // Without a model, what is measured is gRPC alone.
  explicit PredictorService(Model* model) : model_(model) {}

  grpc::Status Predict(grpc::ServerContext*, const predictor::PredictionRequest* request,
                       predictor::PredictionResponse* response) override {
    const auto& dense = request->float_features();
    const auto& sparse = request->id_list_features();
    const std::int64_t rows = request->batch_size();
    const std::int64_t columns = dense.num_features();
    const std::int64_t bags = rows * sparse.num_features();
    if (rows <= 0 || columns < 0 || bags < 0) return InvalidArgument("batch_size and num_features must be positive");
    if (dense.values().size() != rows * columns * sizeof(float)) {
      return InvalidArgument("float_features.values does not hold batch_size x num_features float32");
    }
    if (sparse.lengths().size() != bags * sizeof(std::int32_t)) {
      return InvalidArgument("id_list_features.lengths does not hold num_features x batch_size int32");
    }
    if (sparse.values().size() % sizeof(std::int32_t) != 0) {
      return InvalidArgument("id_list_features.values does not hold int32");
    }
    const std::int64_t ids = sparse.values().size() / sizeof(std::int32_t);
    if (model_ == nullptr) {
      if (columns == 0) return InvalidArgument("without a model there must be a dense value to answer with");
      auto& scores = *(*response->mutable_predictions())["default"].mutable_data();
      const float* values = View<float>(dense.values(), {rows, columns}).const_data_ptr<float>();
      for (std::int64_t row = 0; row < rows; ++row) scores.Add(values[row * columns]);
      return grpc::Status::OK;
    }
    try {
      Features features;
      features.insert("float_features", View<float>(dense.values(), {rows, columns}));
      features.insert("id_list_features.lengths", View<std::int32_t>(sparse.lengths(), {bags}));
      features.insert("id_list_features.values", View<std::int32_t>(sparse.values(), {ids}));
      for (const auto& [task, scores] : model_->Predict(std::move(features))) {
        const float* first = scores.const_data_ptr<float>();
        (*response->mutable_predictions())[task].mutable_data()->Add(first, first + scores.numel());
      }
    } catch (const std::exception& error) {
      return {grpc::StatusCode::INTERNAL, Describe(error)};
    }
    return grpc::Status::OK;
  }

 private:
  Model* model_;
};

std::unique_ptr<grpc::Server> StartServer(const Options& options, PredictorService& service, int& bound_port) {
  grpc::ServerBuilder builder;
  // Two servers on one port would share the load without a word: refuse instead.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetMaxReceiveMessageSize(-1);
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, options.completion_queues);
  builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, options.min_pollers);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, options.max_pollers);
  if (options.max_handler_threads > 0) {
    grpc::ResourceQuota quota("torchrec_cpp");
    quota.SetMaxThreads(options.max_handler_threads);
    builder.SetResourceQuota(quota);
  }
  builder.AddListeningPort(options.host + ":" + std::to_string(options.port), grpc::InsecureServerCredentials(),
                           &bound_port);
  builder.RegisterService(&service);
  auto server = builder.BuildAndStart();
  if (server == nullptr) {
    throw std::runtime_error("cannot listen on " + options.host + ":" + std::to_string(options.port));
  }
  return server;
}

void Serve(const Options& options) {
  // Blocked before the first thread is made, so that every thread inherits it and sigwait alone sees the signals.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  sigaddset(&stop_signals, SIGTERM);
  sigaddset(&stop_signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);

  KeepMemory();
  at::set_num_threads(options.threads);
  at::set_num_interop_threads(1);
  std::unique_ptr<Model> model;
  if (options.model != kNoModel) {
    LoadFbgemmOperators(options.fbgemm_dir);
    model = std::make_unique<Model>(options);
    if (options.warmup_rows > 0) model->WarmUp(options.warmup_rows);
  }
  PredictorService service(model.get());
  int port = 0;
  const auto server = StartServer(options, service, port);
  std::cout << "listening on " << options.host << ":" << port << std::endl;

  int received = 0;
  sigwait(&stop_signals, &received);
  server->Shutdown(std::chrono::system_clock::now() + kDrainTime);
  server->Wait();
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    options = ParseOptions(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n" << kUsage;
    return 2;
  }
  try {
    Serve(options);
  } catch (const std::exception& error) {
    std::cerr << Describe(error) << "\n";
    return 1;
  }
  return 0;
}
