// Where a load goes: HOST:PORT, [IPV6]:PORT or unix:PATH, resolved to socket addresses.
#pragma once

#include <sys/socket.h>

#include <string>
#include <vector>

namespace narsil::load {

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
};

// A target's parts, not yet resolved.
struct Target {
  std::string text;       // as it was given
  std::string authority;  // what :authority says
  std::string host;       // without brackets; empty for a Unix socket
  std::string port;
  std::string path;  // of a Unix socket
};

// Throws std::invalid_argument where the text is no target.
Target parse_target(const std::string& text);

// At least one address, in the resolver's order. Throws std::runtime_error where the name has none. May block.
std::vector<Address> resolve(const Target& target);

}  // namespace narsil::load
