// `build` and `step` of the CPU kernels as a program for another kind of processor, with as much of torch as they call.
//
// Standard input has requests: what is wanted, the spec's text, and tensors, of which optional ones may be missing.
// Standard output has what comes of each. tests/support/foreign_kernels.py is the other side.
#include <cstdio>
#include <cstdlib>
#include <map>

#include "operands.h"
#include "step.h"

using spark::Tensor;

struct AtenTensorOpaque {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  int64_t count = 1;
  std::shared_ptr<char> data;
};

namespace {

// In bytes, by dtype.
const std::map<int32_t, int64_t> ITEMS = {{0, 1}, {3, 4}, {4, 8}, {5, 2}, {6, 4}, {7, 8}, {11, 1}, {15, 2}};

// A tensor without data.
AtenTensorHandle described(int32_t dtype, std::vector<int64_t> sizes) {
  const auto t = new AtenTensorOpaque{dtype, sizes, sizes};
  for (size_t d = sizes.size(); d-- > 0;) t->strides[d] = t->count, t->count *= sizes[d];
  return t;
}
AtenTensorHandle made(int32_t dtype, std::vector<int64_t> sizes) {
  const AtenTensorHandle t = described(dtype, sizes);
  t->data.reset(static_cast<char*>(std::malloc(t->count * ITEMS.at(dtype) + 1)), std::free);
  return t;
}

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::abort();
}
int64_t read_number() {
  int64_t number;
  read(&number, sizeof number);
  return number;
}
// A dtype, or -1 for no tensor, the number of sizes, sizes, data.
std::optional<Tensor> read_optional() {
  const int64_t dtype = read_number();
  if (dtype < 0) return std::nullopt;
  std::vector<int64_t> sizes(read_number());
  for (int64_t& size : sizes) size = read_number();
  const AtenTensorHandle t = made(int32_t(dtype), sizes);
  read(t->data.get(), t->count * ITEMS.at(t->dtype));
  return Tensor(t);
}
Tensor read_tensor() { return read_optional().value(); }
std::string read_text() {
  std::string text(read_number(), ' ');
  read(text.data(), text.size());
  return text;
}
std::optional<int64_t> read_count() {
  const auto t = read_optional();
  if (!t) return std::nullopt;
  return *static_cast<const int64_t*>(t->const_data_ptr());
}

void write(const void* from, size_t bytes) {
  if (bytes && std::fwrite(from, bytes, 1, stdout) != 1) std::abort();
}
void write(const Tensor& tensor) {
  const AtenTensorHandle t = tensor.get();
  const int64_t head[2] = {t->dtype, int64_t(t->sizes.size())};
  write(head, sizeof head), write(t->sizes.data(), 8 * t->sizes.size());
  write(t->data.get(), t->count * ITEMS.at(t->dtype));
}
void write_number(int64_t number) { write(&number, sizeof number); }

// What comes of a request, or nothing if native code cannot do it.
std::vector<Tensor> answer(int64_t wanted, const std::string& text) {
  const spark::Spec* spec = spark::spec_of(text);
  if (wanted == 0) {
    const Tensor key = read_tensor(), value = read_tensor();
    std::vector<Tensor> queries;
    for (int64_t left = read_number(); left > 0; --left) queries.push_back(read_tensor());
    const auto capacity = read_count();
    const auto positions = read_optional();
    std::array<Tensor, 4> cache{key, key, key, key};
    if (!spark::build(key, value, queries, spec, capacity, positions, cache)) return {};
    return {cache.begin(), cache.end()};
  }
  // Members of a list in braces are read in this order.
  const spark::StepOperands o{read_tensor(), read_tensor(), read_tensor(), read_tensor(), read_tensor(), read_tensor(), read_tensor(),
                              read_optional(), read_optional(), read_count(), read_count(), read_optional(), text};
  std::optional<Tensor> lse;
  const auto output = spark::step(o, spec, wanted == 2 ? &lse : nullptr);
  if (!output) return {};
  std::vector<Tensor> results{o.key_pages, o.key_head, o.value_pages, o.value_head, *output};
  if (lse) results.push_back(*lse);
  return results;
}

}  // namespace

extern "C" {
#define DTYPE(name, number) int32_t aoti_torch_dtype_##name() { return number; }
DTYPE(uint8, 0) DTYPE(int8, 1) DTYPE(int16, 2) DTYPE(int32, 3) DTYPE(int64, 4) DTYPE(float16, 5) DTYPE(float32, 6)
DTYPE(float64, 7) DTYPE(complex32, 8) DTYPE(complex64, 9) DTYPE(complex128, 10) DTYPE(bool, 11) DTYPE(bfloat16, 15)
#undef DTYPE
uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }
int32_t aoti_torch_device_type_cpu() { return 0; }
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) { return *type = 0; }
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** data) { return *data = t->data.get(), 0; }
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** data) { return *data = t->data.get(), 0; }
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** data) { return *data = t->data.get(), 0; }
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* dim) { return *dim = t->sizes.size(), 0; }
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* count) { return *count = t->count, 0; }
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** sizes) { return *sizes = t->sizes.data(), 0; }
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** strides) { return *strides = t->strides.data(), 0; }
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* size) { return *size = t->sizes[d], 0; }
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* stride) { return *stride = t->strides[d], 0; }
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* dtype) { return *dtype = t->dtype, 0; }
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool* is) { return *is = true, 0; }
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) { return delete t, 0; }
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t*, int32_t dtype, int32_t, int32_t,
                                        AtenTensorHandle* tensor) {
  return *tensor = made(dtype, {sizes, sizes + dims}), 0;
}
int32_t aoti_torch_layout_strided() { return 0; }
AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t*, int64_t, int32_t dtype, int32_t, int32_t,
                               AtenTensorHandle* tensor, int32_t, const uint8_t*, int64_t, void (*free)(void*, void*), void* context) {
  *tensor = described(dtype, {sizes, sizes + dims});
  (*tensor)->data.reset(static_cast<char*>(data), [=](char* own) { free(own, context); });
  return 0;
}
AOTITorchError torch_get_num_threads(uint32_t* threads) { return *threads = 2, 0; }
AOTITorchError torch_parallel_for(int64_t first, int64_t last, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  for (; first < last; ++first) f(first, first + 1, context);
  return 0;
}
}

int main() {
  int64_t wanted;
  while (std::fread(&wanted, sizeof wanted, 1, stdin) == 1) {
    const std::string text = read_text();
    try {
      const std::vector<Tensor> results = answer(wanted, text);
      write_number(results.size());
      for (const Tensor& t : results) write(t);
    } catch (const std::invalid_argument& error) {
      const std::string what = error.what();
      write_number(-1), write_number(what.size()), write(what.data(), what.size());
    }
    std::fflush(stdout);
  }
}
