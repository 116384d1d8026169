// What a fuzzer holds to be true whatever the input: where it is not, the run ends and the input is kept.
#pragma once

#include <cstdio>
#include <cstdlib>

#define REQUIRE(what)                                     \
  do {                                                    \
    if (!(what)) {                                        \
      std::fprintf(stderr, "does not hold: %s\n", #what); \
      std::abort();                                       \
    }                                                     \
  } while (0)
