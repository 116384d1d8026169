// What is served: models, and the set of them that requests are decoded against.
//
// A model is constant once it is made. The set is swapped as one; whoever decodes keeps the set that it began with, and
// a decoded request keeps its model.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace narsil::native {

// What a request is held against. T features, D dense columns.
struct Schema {
  int64_t dense_dim = 0;
  std::vector<uint8_t> takes_nan;  // (D,) whether NaN is a value of each column; empty where it is of none
  std::vector<int64_t> rows;       // (T,) of each feature's table
  std::vector<int64_t> least;      // (T,) of each feature: its ids are from here to rows - 1
  bool wide_ids = false;           // a batch's ids are int64
  int64_t max_rows = 0;            // of one request
  int64_t max_ids = 0;

  int64_t features() const { return static_cast<int64_t>(rows.size()); }
};

// What a tensor of the Open Inference Protocol holds, by its name. Each of ids, values and lengths is one tensor of all
// features (BY_ROW, BAGS), of all features key-major (LISTS, and SCORE_LISTS with weights), or of one (FEATURES).
struct Place {
  enum Form : uint8_t { DENSE, BY_ROW, BAGS, LISTS, SCORE_LISTS, FEATURES };
  enum Part : uint8_t { IDS, VALUES, LENGTHS };

  Form form;
  Part part;
  uint32_t feature = 0;
};

// The names under which tensors come for a model.
class Places {
 public:
  Places() = default;  // no tensor has a place
  explicit Places(const std::vector<std::string>& features);

  // Null where there is none.
  const Place* find(std::string_view name) const {
    const auto found = places_.find(name);
    return found == places_.end() ? nullptr : &found->second;
  }

 private:
  std::map<std::string, Place, std::less<>> places_;
};

struct Model {
  std::string name, version;
  Schema schema;
  Places places = {};
  std::vector<std::string> tasks = {};
};

using ModelPtr = std::shared_ptr<const Model>;

// How a request names the model that it means; empty where it does not.
struct ModelName {
  std::string name, version;
};

// Where requests go that name a model without a version, or a label in its place: to each of the parts in its share.
class Route {
 public:
  // Shares are above 0; there is at least one part.
  Route(std::string name, std::string version, std::vector<std::pair<ModelPtr, double>> parts)
      : name(std::move(name)), version(std::move(version)), parts_(std::move(parts)) {
    for (const auto& part : parts_) total_ += part.second;
  }

  const std::string name, version;  // as a request gives them; the version may be empty

  // The next request's part. By multiples of the golden ratio, so that every stretch of requests has about its shares;
  // catalog.py deals alike.
  const ModelPtr& next() const {
    constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
    const uint64_t turn = turns_.fetch_add(1, std::memory_order_relaxed) * GOLDEN;
    double left = static_cast<double>(turn >> 11) * 0x1p-53 * total_;
    for (const auto& part : parts_)
      if ((left -= part.second) < 0) return part.first;
    return parts_.back().first;
  }

 private:
  std::vector<std::pair<ModelPtr, double>> parts_;
  double total_ = 0;
  mutable std::atomic<uint64_t> turns_{0};
};

class ModelSet {
 public:
  ModelSet() = default;  // nothing is served

  // Without a name a request means the name of models[fallback]. A version is a model's own, or else a route's; without
  // one it means the route of that name that has none, or else models[fallback] or the first listed of the name.
  ModelSet(std::vector<ModelPtr> models, size_t fallback, std::vector<std::unique_ptr<const Route>> routes = {})
      : models_(std::move(models)), fallback_(fallback), routes_(std::move(routes)) {}

  // Null where there is no such model.
  ModelPtr find(std::string_view name, std::string_view version) const {
    if (models_.empty()) return nullptr;
    const ModelPtr& usual = models_[fallback_];
    const bool unnamed = name.empty();
    if (unnamed) name = usual->name;
    if (!version.empty())
      for (const ModelPtr& model : models_)
        if (model->name == name && model->version == version) return model;
    for (const auto& route : routes_)
      if (route->name == name && route->version == version) return route->next();
    if (!version.empty()) return nullptr;
    if (unnamed) return usual;
    for (const ModelPtr& model : models_)
      if (model->name == name) return model;
    return nullptr;
  }

 private:
  std::vector<ModelPtr> models_;
  size_t fallback_ = 0;
  std::vector<std::unique_ptr<const Route>> routes_;
};

}  // namespace narsil::native
