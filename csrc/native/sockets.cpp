#include "native/sockets.hpp"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cstring>
#include <memory>

namespace narsil::native {
namespace {

using wire::Descriptor;
using wire::fail;

constexpr int BACKLOG = 1024;

Descriptor new_socket(int family) { return Descriptor(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

// None, and errno, where it cannot.
Descriptor listening(const addrinfo& where, int port, bool reuse_port) {
  Descriptor made = new_socket(where.ai_family);
  if (!made) return made;
  sockaddr_storage address{};
  std::memcpy(&address, where.ai_addr, where.ai_addrlen);
  auto& place = where.ai_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                                            : reinterpret_cast<sockaddr_in&>(address).sin_port;
  place = htons(static_cast<uint16_t>(port));
  const int on = 1;
  setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (reuse_port) setsockopt(made.get(), SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
  if (bind(made.get(), reinterpret_cast<sockaddr*>(&address), where.ai_addrlen) || listen(made.get(), BACKLOG))
    made.close();
  return made;
}

int port_of(const Descriptor& listener) {
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  getsockname(listener.get(), reinterpret_cast<sockaddr*>(&bound), &size);
  return ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                                           : reinterpret_cast<sockaddr_in&>(bound).sin_port);
}

// Whether the file is a socket on which nobody listens, left over from a server that was killed. Any other kind of file
// refuses connections likewise, and is not to be touched. Throws where somebody listens.
bool is_stale(const std::string& path, const sockaddr* where, socklen_t size) {
  const Descriptor probe = new_socket(AF_UNIX);
  if (!probe) fail("socket");
  if (!connect(probe.get(), where, size) || errno == EAGAIN) {
    errno = EADDRINUSE;
    fail("bind");
  }
  struct stat found;
  return errno == ECONNREFUSED && !lstat(path.c_str(), &found) && S_ISSOCK(found.st_mode);
}

}  // namespace

std::vector<Descriptor> listen_tcp(const std::string& host, int& port, bool reuse_port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int problem = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (problem) throw std::system_error(EADDRNOTAVAIL, std::generic_category(), gai_strerror(problem));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> guard(found, freeaddrinfo);
  std::vector<Descriptor> listeners;
  std::vector<std::string> seen;
  int absent = EADDRNOTAVAIL;
  for (const addrinfo* at = found; at; at = at->ai_next) {
    if (at->ai_family != AF_INET && at->ai_family != AF_INET6) continue;
    std::string address(reinterpret_cast<const char*>(at->ai_addr), at->ai_addrlen);
    if (std::find(seen.begin(), seen.end(), address) != seen.end()) continue;
    seen.push_back(std::move(address));
    Descriptor made = listening(*at, port, reuse_port);
    if (made) {
      if (!port) port = port_of(made);
      listeners.push_back(std::move(made));
      continue;
    }
    if (errno != EAFNOSUPPORT && errno != EADDRNOTAVAIL) fail("listen");
    absent = errno;
  }
  if (listeners.empty()) throw std::system_error(absent, std::generic_category(), "listen");
  return listeners;
}

Descriptor listen_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    fail("unix socket path");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* const where = reinterpret_cast<const sockaddr*>(&address);
  const bool stale = is_stale(path, where, sizeof address);
  Descriptor made = new_socket(AF_UNIX);
  if (!made) fail("socket");
  if (stale) unlink(path.c_str());
  if (bind(made.get(), where, sizeof address) || listen(made.get(), BACKLOG)) fail("bind");
  return made;
}

}  // namespace narsil::native
