#include "native/header_guard.hpp"

#include <algorithm>
#include <cstring>

namespace narsil::native {
namespace {

constexpr uint8_t HEADERS = 1, CONTINUATION = 9;
constexpr uint8_t END_STREAM = 0x1, END_HEADERS = 0x4, PADDED = 0x8, WITH_PRIORITY = 0x20;
constexpr size_t HEAD = 9;
constexpr size_t FRAME = 16'384;
constexpr int MAX_FRAMES = 128;  // of one block; they may be empty

constexpr size_t LONGEST = 65'536;   // bytes of a string that the library takes
constexpr size_t ROOMY = 128 << 10;  // a block of this size keeps long strings no more
// A field of this size is larger than the whole table of fields (4,096 bytes): where it is to be put in, both ends
// empty the table. So does the one that it stands for.
constexpr size_t STAND_IN = 4'097;

size_t size_of(const uint8_t* head) { return size_t{head[0]} << 16 | size_t{head[1]} << 8 | head[2]; }

uint32_t stream_of(const uint8_t* head) {
  return uint32_t{head[5] & 0x7Fu} << 24 | uint32_t{head[6]} << 16 | uint32_t{head[7]} << 8 | head[8];
}

std::array<uint8_t, HEAD> head_of(size_t size, uint8_t type, uint8_t flags, uint32_t stream) {
  const auto byte = [](size_t value, int shift) { return static_cast<uint8_t>(value >> shift); };
  return {byte(size, 16),   byte(size, 8),    byte(size, 0),   type,           flags,
          byte(stream, 24), byte(stream, 16), byte(stream, 8), byte(stream, 0)};
}

// A string's length, with 7 bits in the first byte.
void put_length(std::string& out, size_t length, bool huffman) {
  const char flag = huffman ? '\x80' : '\0';
  if (length < 127) {
    out.push_back(static_cast<char>(flag | static_cast<char>(length)));
    return;
  }
  out.push_back(static_cast<char>(flag | 127));
  for (length -= 127; length > 127; length >>= 7) out.push_back(static_cast<char>(length | 128));
  out.push_back(static_cast<char>(length));
}

}  // namespace

HeaderGuard::Verdict HeaderGuard::feed(const uint8_t* data, size_t size) {
  const uint8_t* const end = data + size;
  verdict_ = Verdict::FINE;
  more_ = true;
  unpassed_ = data;
  for (const uint8_t* at = data; at < end && more_ && verdict_ != Verdict::BROKEN;) {
    at = left_ ? take_payload(at, end) : take_head(at, end);
    if (!left_ && payload_ == Payload::COLLECTED && verdict_ != Verdict::BROKEN) payload_done();
  }
  if (verdict_ != Verdict::BROKEN) pass_until(end);
  return verdict_;
}

const uint8_t* HeaderGuard::take_payload(const uint8_t* at, const uint8_t* end) {
  const size_t count = std::min(left_, static_cast<size_t>(end - at));
  if (payload_ == Payload::COLLECTED) collect(at, count);
  left_ -= count;
  at += count;
  if (payload_ != Payload::PASSED) unpassed_ = at;
  return at;
}

const uint8_t* HeaderGuard::take_head(const uint8_t* at, const uint8_t* end) {
  if (!head_have_ && static_cast<size_t>(end - at) >= HEAD) {
    head_done(at);
    if (payload_ == Payload::PASSED) return at + HEAD;  // with what is around it
    pass_until(at);
    return unpassed_ = at + HEAD;
  }
  pass_until(at);
  const size_t count = std::min(HEAD - head_have_, static_cast<size_t>(end - at));
  std::memcpy(head_.data() + head_have_, at, count);
  head_have_ += count;
  unpassed_ = at + count;
  if (head_have_ == HEAD) {
    head_have_ = 0;
    head_done(head_.data());
    if (payload_ == Payload::PASSED) pass(head_.data(), HEAD);
  }
  return at + count;
}

void HeaderGuard::pass(const uint8_t* data, size_t size) {
  if (size && more_) more_ = sink_(data, size);
}

void HeaderGuard::pass_until(const uint8_t* at) {
  pass(unpassed_, static_cast<size_t>(at - unpassed_));
  unpassed_ = at;
}

void HeaderGuard::give_up() {
  lost_ = true;
  std::string().swap(block_);
  if (payload_ == Payload::COLLECTED) payload_ = Payload::DROPPED;
}

// Decides what is to become of the frame with this head.
void HeaderGuard::head_done(const uint8_t* head) {
  const uint8_t type = head[3], flags = head[4];
  const uint32_t stream = stream_of(head);
  left_ = size_of(head);
  if (open_) {
    if (type != CONTINUATION || stream != stream_) return break_off();
  } else if (type == HEADERS && (lost_ || !(flags & END_HEADERS) || left_ > LONGEST)) {
    begin_block(flags, stream);
  } else {
    // Of streams whose blocks were thrown away the library has never heard.
    payload_ = lost_ && stream > newest_ ? Payload::DROPPED : Payload::PASSED;
    if (type == HEADERS) newest_ = std::max(newest_, stream);
    return;
  }
  last_ = flags & END_HEADERS;
  padded_ = type == HEADERS && flags & PADDED;
  prelude_ = (padded_ ? 1 : 0) + (type == HEADERS && flags & WITH_PRIORITY ? 5 : 0);
  padding_ = 0;
  if (left_ < prelude_) return break_off();
  if (++frames_ > MAX_FRAMES && !lost_) {
    give_up();
    verdict_ = Verdict::ENDLESS;
  }
  payload_ = lost_ ? Payload::DROPPED : Payload::COLLECTED;
  if (lost_ && last_) open_ = false;
}

void HeaderGuard::break_off() {
  payload_ = Payload::DROPPED;
  verdict_ = Verdict::BROKEN;
}

void HeaderGuard::begin_block(uint8_t flags, uint32_t stream) {
  open_ = true;
  frames_ = 0;
  flags_ = flags;
  stream_ = stream;
  block_.clear();
  cut_ = 0;
  part_ = Part::REPRESENTATION;
}

// A piece of the payload of a frame of the block.
void HeaderGuard::collect(const uint8_t* data, size_t size) {
  size_t left = left_;  // in the frame, of which these are the first
  const uint8_t* const end = data + size;
  while (data < end) {
    if (prelude_) {
      if (padded_) padding_ = *data;
      padded_ = false;
      --prelude_, --left, ++data;
      if (left < prelude_ + padding_) return break_off();
    } else if (left <= padding_) {
      return;
    } else if (part_ == Part::STRING) {
      const size_t count = std::min({length_, left - padding_, static_cast<size_t>(end - data)});
      if (kept_) block_.append(reinterpret_cast<const char*>(data), count);
      length_ -= count, left -= count, data += count;
      if (!length_) part_done();
    } else {
      read_byte(*data);
      --left, ++data;
    }
    if (verdict_ == Verdict::BROKEN) return;
    if (block_.size() > most_) {
      give_up();
      verdict_ = Verdict::ENDLESS;
      if (last_) open_ = false;
      return;
    }
  }
}

void HeaderGuard::read_byte(uint8_t byte) {
  switch (part_) {
    case Part::REPRESENTATION: {
      // RFC 7541, section 6: by the highest bits, and with the index, or the new size of the table, in the others.
      const bool literal = !(byte & 0x80) && (byte & 0x60) != 0x20;
      const uint8_t bits = byte & 0x80 ? 0x7F : byte & 0x40 ? 0x3F : byte & 0x20 ? 0x1F : 0x0F;
      strings_ = !literal ? 0 : byte & bits ? 1 : 2;
      indexed_ = (byte & 0xC0) == 0x40;
      block_.push_back(static_cast<char>(byte));
      if ((byte & bits) == bits) {
        part_ = Part::INDEX;
      } else {
        part_ = strings_ ? Part::LENGTH : Part::REPRESENTATION;
      }
      return;
    }
    case Part::INDEX:
      block_.push_back(static_cast<char>(byte));
      if (!(byte & 0x80)) part_ = strings_ ? Part::LENGTH : Part::REPRESENTATION;
      return;
    case Part::LENGTH:
      huffman_ = byte & 0x80;
      length_ = byte & 0x7F;
      shift_ = 0;
      part_ = Part::LONGER_LENGTH;
      if (length_ < 127) begin_string();
      return;
    case Part::LONGER_LENGTH:
      length_ += size_t{byte & 0x7Fu} << shift_;
      shift_ += 7;
      if (shift_ > 28) return break_off();  // libnghttp2 takes no such length either
      if (!(byte & 0x80)) begin_string();
      return;
    case Part::STRING:
      return;  // see collect
  }
}

void HeaderGuard::begin_string() {
  part_ = Part::STRING;
  kept_ = length_ <= (block_.size() < ROOMY ? LONGEST : STAND_IN);
  if (kept_) {
    put_length(block_, length_, huffman_);
  } else {
    const size_t size = indexed_ ? STAND_IN : 1;
    put_length(block_, size, false);
    block_.append(size, 'x');
    cut_ += length_ - size;
  }
  if (!length_) part_done();
}

void HeaderGuard::part_done() { part_ = --strings_ ? Part::LENGTH : Part::REPRESENTATION; }

// Passes the block on, if this was its last frame.
void HeaderGuard::payload_done() {
  if (!last_) return;
  open_ = false;
  payload_ = Payload::DROPPED;  // there is nothing left of it
  if (part_ != Part::REPRESENTATION) return break_off();
  newest_ = std::max(newest_, stream_);
  const std::string block = std::move(block_);
  block_.clear();
  pass_block(reinterpret_cast<const uint8_t*>(block.data()), block.size());
  cut_ = 0;
}

// In frames of a size that is right even before the peer has heard of a larger one.
void HeaderGuard::pass_block(const uint8_t* data, size_t size) {
  for (bool first = true;; first = false) {
    const size_t count = std::min(size, FRAME);
    const bool last = count == size;
    const uint8_t flags = (first ? flags_ & END_STREAM : 0) | (last ? END_HEADERS : 0);
    const auto head = head_of(count, first ? HEADERS : CONTINUATION, flags, stream_);
    pass(head.data(), head.size());
    pass(data, count);
    if (last) return;
    data += count;
    size -= count;
  }
}

}  // namespace narsil::native
