// Sees a peer's bytes before libnghttp2 does, and takes over what the library would end the connection for.
//
// A header block is state that both ends share: none of it may be passed over, and the library ends the connection
// where a string in it has more than 64 KiB, or where it comes in more than a few frames. One call's metadata would
// thus end all the calls beside it. So a block that is not one plain frame of modest size is collected here, and passed
// on with its overlong strings replaced by shorter ones that do the same to the state (RFC 7541). Everything else
// passes as it is, without a copy.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace narsil::native {

class HeaderGuard {
 public:
  // Takes what passes; false where nothing more is to come.
  using Sink = std::function<bool(const uint8_t* data, size_t size)>;

  enum class Verdict : uint8_t {
    FINE,
    BROKEN,   // this is no HTTP/2; nothing more is taken
    ENDLESS,  // a block beyond all bounds: it and every later one is thrown away; what passes is of older streams
  };

  // `most` is the size of a block that is still collected.
  HeaderGuard(Sink sink, size_t most) : sink_(std::move(sink)), most_(most) {}

  // ENDLESS is said once. False from the sink ends it with FINE.
  Verdict feed(const uint8_t* data, size_t size);

  // Throws away the block that is being collected, and every later one.
  void give_up();

  // Bytes that were cut from the block which is passing.
  size_t cut() const { return cut_; }

  // Bytes of the block that is being collected, or 0 where none is.
  size_t held() const { return open_ && !lost_ ? head_.size() + block_.size() : 0; }

 private:
  enum class Payload : uint8_t { PASSED, COLLECTED, DROPPED };
  // Of a block: what the next byte is. A representation is an index, and a name and a value as far as they are given.
  enum class Part : uint8_t { REPRESENTATION, INDEX, LENGTH, LONGER_LENGTH, STRING };

  const uint8_t* take_payload(const uint8_t* at, const uint8_t* end);
  const uint8_t* take_head(const uint8_t* at, const uint8_t* end);
  void head_done(const uint8_t* head);
  void begin_block(uint8_t flags, uint32_t stream);
  void collect(const uint8_t* data, size_t size);
  void read_byte(uint8_t byte);
  void begin_string();
  void part_done();
  void payload_done();
  void break_off();
  void pass_block(const uint8_t* data, size_t size);
  void pass(const uint8_t* data, size_t size);
  void pass_until(const uint8_t* at);

  const Sink sink_;
  const size_t most_;
  // While bytes are fed.
  Verdict verdict_ = Verdict::FINE;
  bool more_ = true;                   // the sink takes more
  const uint8_t* unpassed_ = nullptr;  // bytes from here on have not been dealt with yet

  bool lost_ = false;    // blocks are thrown away
  uint32_t newest_ = 0;  // the last stream whose block has passed

  // The frame at hand.
  std::array<uint8_t, 9> head_{};  // as far as it has come, where it comes in pieces
  size_t head_have_ = 0;
  Payload payload_ = Payload::PASSED;
  size_t left_ = 24;  // bytes of the payload; a connection begins with a preface, which passes like one

  // The block at hand.
  bool open_ = false;  // more frames of it are to come
  bool last_ = false;  // and this is the last
  int frames_ = 0;
  uint8_t flags_ = 0;
  uint32_t stream_ = 0;
  size_t prelude_ = 0, padding_ = 0;  // bytes before and behind the fragment in this frame's payload
  bool padded_ = false;               // the first byte of the prelude is the padding's size
  std::string block_;                 // what has been collected
  size_t cut_ = 0;

  Part part_ = Part::REPRESENTATION;
  int strings_ = 0;  // of the representation, still to come
  bool indexed_ = false;
  bool huffman_ = false, kept_ = false;
  size_t length_ = 0;  // of the string, and then what is left of it
  int shift_ = 0;
};

}  // namespace narsil::native
