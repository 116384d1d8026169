// Finds and checks the parts of a scoring request without copying them.
#pragma once

#include "native/model.hpp"

namespace narsil::native {

// A scoring request's parts, as spans of its message or of `own`. All numbers in it have been checked against its
// model's schema: ids are inside their tables, lengths add up, dense values are finite. Spans may be unaligned.
struct Decoded {
  ModelPtr model;  // null: unusual or wrong; the portable decoder in Python takes the message or says what is wrong
  bool one_hot = false;
  bool key_major = false;
  bool wide = false;  // ids are int64; lengths are int32
  int64_t rows = 0;
  int64_t ids = 0;                   // N
  const uint8_t* dense = nullptr;    // (B, D) float32
  const uint8_t* values = nullptr;   // (N,) int32 or int64
  const uint8_t* lengths = nullptr;  // (T, B) if key_major, else (B, T); null in a message that leaves them out
  std::string request_id;
  std::vector<uint32_t> outputs;   // places of the tasks that are asked for, in this order; empty: all
  std::shared_ptr<uint8_t[]> own;  // ids and lengths that did not lie in the message as they are kept here
  size_t own_size = 0;             // bytes
};

// All take only the plain, common form of a message that is right in every point: each field once, no feature names,
// no weights, no context, lengths in int32, a model that is in the set. `model` stays null for all else, and nothing is
// said about why: the portable decoder is the one place that explains. Spans point into `data`. `named` is what the
// request's metadata says; a message that names another model than its metadata is left alone.
//
// Of the Open Inference Protocol that is: FP32, INT32 and INT64 in raw_input_contents, ids in any one of the forms of
// src/narsil/transports/codec/tensors.py (lengths may be int64), no parameters, a model with one group of each kind. A
// tensor for each feature is copied, so that ids lie in one piece.
Decoded decode_predictor(const uint8_t* data, size_t size, const ModelSet& models, const ModelName& named);
Decoded decode_narsil(const uint8_t* data, size_t size, const ModelSet& models, const ModelName& named);
Decoded decode_oip(const uint8_t* data, size_t size, const ModelSet& models, const ModelName& named);

}  // namespace narsil::native
