// Scores to reply messages.
#pragma once

#include <string>
#include <vector>

#include "native/model.hpp"

namespace narsil::native {

struct TaskScores {
  std::string task;
  const uint8_t* values;  // float32, all numbers of row 0 first
  size_t count;
  size_t width = 0;  // numbers for each row, where there may be more than one
};

// What narsil.v1 tells a client about how its answer came about.
struct Provenance {
  uint64_t batch_requests = 0, batch_rows = 0, queue_us = 0, execute_us = 0;
};

// A framed predictor.PredictionResponse, as the protobuf runtime writes it.
std::string encode_predictor(const std::vector<TaskScores>& scores);

// A framed ModelInferResponse of the Open Inference Protocol.
std::string encode_oip(const std::vector<TaskScores>& scores, const Model& model, const std::string& request_id);

// A framed narsil.v1.PredictResponse.
std::string encode_narsil(const std::vector<TaskScores>& scores, const Model& model, const std::string& request_id,
                          const Provenance& provenance);

}  // namespace narsil::native
