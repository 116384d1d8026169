// What is served: models, and the set of them that requests are decoded against.
//
// A model is constant once it is made. The set is swapped as one; whoever decodes keeps the set that it began with, and
// a decoded request keeps its model.
#pragma once

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

class ModelSet {
 public:
  ModelSet() = default;  // nothing is served

  // Without a name a request means models[fallback] or, where it gives a version, that version of its name; without a
  // version, the first listed of a name.
  ModelSet(std::vector<ModelPtr> models, size_t fallback) : models_(std::move(models)), fallback_(fallback) {}

  // Null where there is no such model.
  ModelPtr find(std::string_view name, std::string_view version) const {
    if (models_.empty()) return nullptr;
    const ModelPtr& usual = models_[fallback_];
    if (name.empty() && version.empty()) return usual;
    if (name.empty()) name = usual->name;
    for (const ModelPtr& model : models_)
      if (model->name == name && (version.empty() || model->version == version)) return model;
    return nullptr;
  }

 private:
  std::vector<ModelPtr> models_;
  size_t fallback_ = 0;
};

}  // namespace narsil::native
