// Finds and checks the parts of a scoring request without copying them.
#pragma once

#include "native/call.hpp"

namespace narsil {

// Both take only the plain, common form of a message that is right in every point: each field once, no feature names,
// no weights, no context. `valid` stays false for all else, and nothing is said about why: the portable decoder is the
// one place that explains. Spans point into `data`.
Decoded decode_predictor(const uint8_t* data, size_t size, const Schema& schema);
Decoded decode_narsil(const uint8_t* data, size_t size, const Schema& schema);

}  // namespace narsil
