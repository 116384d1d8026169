// A file descriptor that is closed by whoever owns it.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace narsil::wire {

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int number) : number_(number) {}  // below 0: none
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    if (this != &other) {
      close();
      number_ = std::exchange(other.number_, -1);
    }
    return *this;
  }
  ~Descriptor() { close(); }

  int get() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }

  // Leaves errno as it is, so that the reason why something is given up survives giving it up.
  void close() {
    if (number_ < 0) return;
    const int reason = errno;
    ::close(number_);
    errno = reason;
    number_ = -1;
  }

 private:
  int number_ = -1;
};

// Throws errno's meaning.
[[noreturn]] inline void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A call's new descriptor. Throws where it gave none.
inline Descriptor owned(int number, const char* what) {
  if (number < 0) fail(what);
  return Descriptor(number);
}

}  // namespace narsil::wire
