// Signals that end the process at once, whatever it is doing.
#pragma once

#include <string>

namespace narsil {

// Has the signal `number` write `last_words` to standard error and end the process, as the signal's own action would:
// also where the interpreter's lock is held for minutes, and also in process 1 of a container, which the kernel spares;
// that one exits with 128 + number. False, with errno set, where the number is no signal or none that can be caught.
bool end_on_signal(int number, const std::string& last_words);

}  // namespace narsil
