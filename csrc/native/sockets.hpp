// Sockets that listen. All are non-blocking and closed on exec.
#pragma once

#include <string>
#include <vector>

#include "wire/descriptor.hpp"

namespace narsil::native {

// One for every address that the name has here, on one port: localhost is of two families, and one may be switched off.
// A port of 0 becomes the one that was free. Throws std::system_error.
std::vector<wire::Descriptor> listen_tcp(const std::string& host, int& port, bool reuse_port);

// A socket file that a dead server left is replaced. Throws std::system_error.
wire::Descriptor listen_unix(const std::string& path);

}  // namespace narsil::native
