// Runs a fuzz target over files and folders, where there is no libFuzzer.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

static void run(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

int main(int count, char** names) {
  size_t runs = 0;
  for (int i = 1; i < count; ++i) {
    if (!std::filesystem::is_directory(names[i])) {
      run(names[i]);
      ++runs;
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(names[i])) {
      run(entry.path());
      ++runs;
    }
  }
  std::printf("%zu inputs, nothing found\n", runs);
  return runs ? 0 : 1;
}
