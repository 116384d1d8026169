// Spans of a message, and what they are held against. Shared by the decoders of all wires.
#pragma once

#include <string>
#include <string_view>

#include "native/decode.hpp"
#include "wire/protobuf.hpp"

namespace narsil::native {

// A field's bytes, once they are there.
struct Span {
  const uint8_t* data = nullptr;
  size_t size = 0;
  bool given = false;

  std::string_view text() const { return {reinterpret_cast<const char*>(data), size}; }
};

// False where the field has been there before.
bool once(Span& place, const wire::Reader& reader);

// What the message names or else the metadata; false where the two differ.
bool agreed(std::string_view& name, Span message, const std::string& metadata);

// Whether it is UTF-8 for certain: other text is for the portable decoder to look at.
bool is_ascii(std::string_view text);

// Counts and values against the schema; fills in what is found. `typed`: the message says how wide ids are.
bool right(Decoded& found, Span dense, Span values, Span lengths, const Schema& schema, bool typed);

}  // namespace narsil::native
