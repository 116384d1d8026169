#include "load/target.hpp"

#include <netdb.h>
#include <sys/un.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace narsil::load {
namespace {

bool is_port(const std::string& text) {
  const bool digits = std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
  return !text.empty() && text.size() <= 5 && digits && std::stoi(text) > 0 && std::stoi(text) <= 65535;
}

// What may stand in a host name: nothing that could end or split the :authority header.
bool is_host(const std::string& text, bool bracketed) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [&](char c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    return letter || c == '-' || c == '.' || c == '_' || (bracketed && (c == ':' || c == '%'));
  });
}

Address unix_address(const std::string& path) {
  Address address;
  auto* name = reinterpret_cast<sockaddr_un*>(&address.storage);
  name->sun_family = AF_UNIX;
  std::memcpy(name->sun_path, path.c_str(), path.size() + 1);
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + 1);
  return address;
}

}  // namespace

Target parse_target(const std::string& text) {
  Target target;
  target.text = text;
  if (text.rfind("unix:", 0) == 0) {
    target.path = text.substr(text.rfind("unix://", 0) == 0 ? 7 : 5);
    target.authority = "localhost";
    if (target.path.empty() || target.path.size() >= sizeof(sockaddr_un::sun_path) ||
        target.path.find('\0') != std::string::npos) {
      throw std::invalid_argument(text + ": the path of a Unix socket has 1 to 107 bytes");
    }
    return target;
  }
  const auto colon = text.rfind(':');
  if (colon != std::string::npos) {
    target.host = text.substr(0, colon);
    target.port = text.substr(colon + 1);
    target.authority = text;
    const bool bracketed = target.host.size() > 2 && target.host.front() == '[' && target.host.back() == ']';
    if (bracketed) target.host = target.host.substr(1, target.host.size() - 2);
    if (is_port(target.port) && is_host(target.host, bracketed)) return target;
  }
  throw std::invalid_argument(text + " is none of HOST:PORT, [IPV6]:PORT and unix:PATH");
}

std::vector<Address> resolve(const Target& target) {
  if (!target.path.empty()) return {unix_address(target.path)};
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int failed = getaddrinfo(target.host.c_str(), target.port.c_str(), &hints, &found);
  if (failed) throw std::runtime_error(target.text + ": " + gai_strerror(failed));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  std::vector<Address> addresses;
  for (const addrinfo* one = found; one; one = one->ai_next) {
    Address address;
    std::memcpy(&address.storage, one->ai_addr, one->ai_addrlen);
    address.size = one->ai_addrlen;
    addresses.push_back(address);
  }
  return addresses;
}

}  // namespace narsil::load
