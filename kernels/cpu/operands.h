// Tensors that operators are given, checked and as plain pointers.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <span>

#include "append.h"
#include "problem.h"

namespace spark {

using torch::stable::Tensor;

// Calls f with a null pointer of the floating type; false for any other dtype.
template <class Function>
bool with_dtype(ScalarType type, Function f) {
  switch (type) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); return true;
    case ScalarType::BFloat16: f(static_cast<bf16*>(nullptr)); return true;
    case ScalarType::Half: f(static_cast<half*>(nullptr)); return true;
    default: return false;
  }
}

// Raises if this is the library for programs without Python, whose operator would be called next.
inline void need_python([[maybe_unused]] const char* name, [[maybe_unused]] std::string_view spec) {
#ifdef SPARK_DEFINE_OPERATORS
  throw std::runtime_error("no native kernel does what " + std::string(name) + " does in Python, with these operands and " +
                           std::string(spec));
#endif
}

// Calls an operator of Python; `stack` holds its arguments, then its results. Where torch passes on
// what a ValueError said (from 2.13), it stays one.
template <size_t N>
void call(const char* name, std::array<StableIValue, N>& stack) {
  try {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  } catch (const std::exception& error) {
    const std::string_view kind = "ValueError: ", what = error.what();
    if (!what.starts_with(kind)) throw;
    throw std::invalid_argument(std::string(what.substr(kind.size(), what.find("\n\nAt:") - kind.size())));
  }
}

inline std::string listed(std::span<const int64_t> numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

inline std::string described(ScalarType type, std::span<const int64_t> sizes) {
  std::string text = "torch.";
  switch (type) {
    case ScalarType::Float: text += "float32"; break;
    case ScalarType::BFloat16: text += "bfloat16"; break;
    case ScalarType::Half: text += "float16"; break;
    case ScalarType::Byte: text += "uint8"; break;
    default: text += torch::headeronly::toString(type);
  }
  return text + listed(sizes);
}

// Raises std::invalid_argument unless a tensor has a dtype and a shape.
inline void check(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape) {
  const auto is = t.sizes();
  const std::span<const int64_t> sizes(is.data(), is.size()), allowed(shape.begin(), shape.size());
  if (t.scalar_type() == type && std::equal(sizes.begin(), sizes.end(), allowed.begin(), allowed.end())) return;
  throw std::invalid_argument(std::string(name) + " is " + described(t.scalar_type(), sizes) + ": allowed is " +
      described(type, allowed));
}

// The size of a dimension, 1 where there is none.
inline int64_t size_of(const Tensor& t, int64_t dim) { return dim < t.dim() ? t.size(dim) : 1; }

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, 4> strides;
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) strides[d] = step, step *= std::max<int64_t>(sizes.begin()[d], 1);
  AtenTensorHandle made = nullptr;
  // The dispatcher's "new_empty" takes longer than all of a short attention's arguments.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Zero bytes [B, H, N, bytes] that live as long as a cache. Large ones come from the system directly: malloc
// would put them between activations that are freed soon, and leave holes there that later layers
// cannot fill (measured in docs/kernels.md). They become resident when they are written.
inline Tensor new_pages(std::array<int64_t, 4> sizes) {
  constexpr size_t LARGE = 1 << 17;
  const size_t bytes = size_t(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
  void* data = bytes < LARGE ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    Tensor pages = new_tensor({sizes[0], sizes[1], sizes[2], sizes[3]}, ScalarType::Byte);
    std::memset(pages.data_ptr(), 0, bytes);
    return pages;
  }
  const std::array<int64_t, 4> strides{sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
  return torch::stable::from_blob(data, {sizes.data(), 4}, {strides.data(), 4}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte, [bytes](void* mapped) { munmap(mapped, bytes); });
}

// Rows [B, H, S, D] with channels next to each other, a copy only if they are not.
inline Tensor by_channel(const Tensor& t) {
  return t.dim() == 4 && t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
}

// Whether a tensor is [B, H, S, D] of a dtype with channels next to each other.
inline bool are_rows(const Tensor& t, ScalarType type) {
  return t.dim() == 4 && t.is_cpu() && t.scalar_type() == type && (t.size(3) <= 1 || t.stride(3) == 1);
}

inline Rows rows_of(const Tensor& t, int64_t itemsize) {
  const auto strides = t.strides();
  return {static_cast<char*>(t.data_ptr()), strides[0] * itemsize, strides[1] * itemsize, strides[2] * itemsize};
}

inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 8 == 0 && t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0;
}

// A side without its new tokens; nothing if native code cannot read it. Raises std::invalid_argument
// unless it is one of the spec's, with as many batch entries and heads.
inline std::optional<Side> side_of(const char* pages_name, const Tensor& pages, const char* head_name, const Tensor& head,
                                   std::array<int64_t, 2> batch_and_heads, const Spec& spec, const Format& format) {
  const auto [batch, heads] = batch_and_heads;
  const int64_t slots = std::max<int64_t>(size_of(pages, 2), 1);
  const int64_t head_bytes = std::max(size_of(head, 2) / 8 * 8, format.tail);
  check(pages_name, pages, ScalarType::Byte, {batch, heads, slots, format.page_bytes});
  check(head_name, head, ScalarType::Byte, {batch, heads, head_bytes});
  if (!pages.is_cpu() || !head.is_cpu() || batch * heads == 0) return std::nullopt;
  if (pages.stride(3) != 1 || (slots > 1 && pages.stride(2) != format.page_bytes) || head.stride(2) != 1) return std::nullopt;
  if (!is_aligned(pages) || !is_aligned(head)) return std::nullopt;
  Side side{};
  side.spec = &spec, side.format = &format, side.batch = batch, side.heads = heads, side.slots = slots;
  side.pages = {static_cast<char*>(pages.data_ptr()), pages.stride(0), pages.stride(1), format.page_bytes};
  side.head = {static_cast<char*>(head.data_ptr()), head.stride(0), head.stride(1), 0};
  side.pages_end = side.pages.at(batch - 1, heads - 1, slots);
  side.tail_rows = (head_bytes - format.tail) / format.row_bytes();
  side.read_counters();
  return side;
}

// Gives a side its new tokens; false if they lie in a way that native code cannot read.
inline bool set_fresh(Side& side, const Tensor& fresh) {
  side.fresh = rows_of(fresh, side.format->itemsize), side.fresh_tokens = fresh.size(2);
  return are_rows(fresh, side.format->dtype);
}

// Gives a side the positions of its new tokens, which are those of a prompt that stay; false if they
// cannot be (evicted_before in kernels/reference/evict.py).
inline bool set_positions(Side& side, const Tensor& positions) {
  const int64_t heads = side.batch * side.heads, count = side.fresh_tokens, end = side.spec->chosen_end();
  if (!positions.is_cpu() || !positions.is_contiguous() || positions.scalar_type() != ScalarType::Long ||
      positions.numel() != heads * count || count == 0 || !side.spec->evict_tokens) {
    return false;
  }
  const int64_t *all = positions.const_data_ptr<int64_t>(), total = all[count - 1] + 1;
  if (total > MOST_TOKENS || side.spec->stored_tokens(total) != count) return false;
  for (int64_t at = 0; at < heads * count; ++at) {
    const int64_t i = at % count;
    if (i ? all[at] <= all[at - 1] : all[at] < 0) return false;
    if (i < side.spec->sinks && all[at] != i) return false;
    if (i >= std::min(end, count - 1) && all[at] != total - count + i) return false;
  }
  side.fresh_positions = all, side.dropped = total - count;
  return true;
}

// Whether a side can note queries in its statistics.
inline bool fit_queries(const Tensor& query, const Side& side) {
  return are_rows(query, side.format->dtype) && query.size(0) == side.batch && query.size(1) > 0 &&
      query.size(1) % side.heads == 0 && (!side.format->uses_queries() || query.size(3) == side.format->dim);
}

inline Queries queries_of(const Tensor& query, const Side& side) {
  return {rows_of(query, side.format->itemsize), query.size(1), query.size(2)};
}

// Raises std::invalid_argument unless a mask broadcasts to [B, Hq, L', tokens or more].
inline void check_mask(const Problem& p, const std::optional<Tensor>& mask) {
  if (!mask) return;
  const int64_t sizes[4] = {p.batch, p.query_heads, p.queries, p.columns};
  const auto is = mask->sizes();
  bool fits = is.size() <= 4;
  for (size_t back = 0; fits && back < is.size(); ++back) {
    const int64_t size = is[is.size() - 1 - back], allowed = sizes[3 - back];
    fits = size == 1 || size == allowed || (back == 0 && size > allowed);  // more: for the whole capacity
  }
  if (fits) return;
  throw std::invalid_argument("attn_mask is " + listed({is.data(), is.size()}) + ": allowed is what broadcasts to " +
      listed(sizes));
}

// False if the mask, which broadcasts, is none that native code knows.
inline bool set_mask(Problem& p, const std::optional<Tensor>& mask) {
  if (!mask) return true;
  const int64_t missing = 4 - mask->dim();
  if (!mask->is_cpu()) return false;
  for (int64_t d = missing; d < 4; ++d) {
    p.mask_strides[d] = mask->size(d - missing) == 1 ? 0 : mask->stride(d - missing);
  }
  p.mask = static_cast<const char*>(mask->const_data_ptr());
  switch (mask->scalar_type()) {
    case ScalarType::Bool: p.mask_kind = MaskKind::boolean; return true;
    case ScalarType::Float: p.mask_kind = MaskKind::float32; return true;
    case ScalarType::BFloat16: p.mask_kind = MaskKind::bfloat16; return true;
    case ScalarType::Half: p.mask_kind = MaskKind::float16; return true;
    default: return false;
  }
}

// The logits of the softmax's sinks as floats; false if they are none.
inline bool read_sinks(const std::optional<Tensor>& sinks, int64_t heads, Scratch<float>& logits) {
  if (!sinks) return true;
  if (!sinks->is_cpu() || sinks->dim() != 1 || sinks->numel() != heads) return false;
  logits = uncleared_scratch<float>(heads);
  return with_dtype(sinks->scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(sinks->const_data_ptr());
    for (int64_t i = 0; i < heads; ++i) logits[i] = to_float(data[i * sinks->stride(0)]);
  });
}

}  // namespace spark
