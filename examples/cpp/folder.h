// What is in an exported folder besides its packages: JSON, and the weights.
#pragma once

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <unordered_map>

#include "json.h"

using Weights = std::unordered_map<std::string, at::Tensor>;

// The dtypes as manifest.json and as safetensors name them.
inline at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> KNOWN{
      {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}, {"uint8", at::kByte},
      {"int64", at::kLong},    {"int32", at::kInt},         {"bool", at::kBool},    {"F32", at::kFloat},
      {"BF16", at::kBFloat16}, {"F16", at::kHalf},          {"U8", at::kByte},      {"I64", at::kLong},
      {"I32", at::kInt},       {"BOOL", at::kBool}};
  const auto found = KNOWN.find(name);
  if (found == KNOWN.end()) throw std::runtime_error("no dtype is called " + name);
  return found->second;
}

inline Json read_json(const std::string& path) {
  std::ostringstream text;
  if (!(text << std::ifstream(path).rdbuf())) throw std::runtime_error(path + " cannot be read");
  const std::string whole = text.str();
  return JsonReader(whole).read();
}

// A file of safetensors has the length of a header, the header in JSON, and the bytes of the tensors. It stays mapped.
inline Weights read_weights(const std::string& path) {
  struct stat status;
  const int file = open(path.c_str(), O_RDONLY);
  if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error(path + " cannot be read");
  void* mapped = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error(path + " cannot be mapped");
  char* start = static_cast<char*>(mapped);
  const uint64_t length = *reinterpret_cast<const uint64_t*>(start);
  const std::string header(start + 8, length);
  Weights weights;
  for (const auto& [name, about] : JsonReader(header).read().members) {
    if (name == "__metadata__") continue;
    void* data = start + 8 + length + about.at("data_offsets").items[0].number();
    weights[name] = at::from_blob(data, about.at("shape").numbers(), dtype_of(about.at("dtype").text));
  }
  return weights;
}
