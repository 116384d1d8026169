// How many scores a reply holds, read from its protobuf encoding in place.
//
// Receives the message of a reply, which is hostile until it is read; copies nothing and allocates nothing.
// Source of the format: https://protobuf.dev/programming-guides/encoding/.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace narsil::load {

enum class Wire {
  PREDICTOR,  // PredictionResponse: map<string, FloatVec> predictions = 1, FloatVec: repeated float data = 1
  NARSIL,     // PredictResponse: repeated TaskScores scores = 4, TaskScores: string task = 1, bytes values = 2
  OIP,        // ModelInferResponse: repeated InferOutputTensor outputs = 5, whose name is 1; the scores of the n-th are
              // the n-th of repeated bytes raw_output_contents = 6
};

// The number of float32 under `task`, 0 where the task is missing; nothing where the bytes are no such message.
std::optional<size_t> count_scores(Wire wire, std::string_view task, std::string_view message);

}  // namespace narsil::load
