// What torch calls: arguments are checked, become plain pointers, and go to the kernels.
//
// Registered through torch's stable ABI. What native code cannot do goes to the reference, which is
// `spark_reference::<name>` with the same schema.
//
// With SPARK_DEFINE_OPERATORS, it is a library for programs without Python: it has the schemas too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "operands.h"
#include "step.h"

namespace spark {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// A string argument, without the copies that to<std::string> makes at every call.
class Text {
 public:
  explicit Text(StableIValue value) : handle_(to<StringHandle>(value)) {
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    view_ = {data, length};
  }
  ~Text() { torch_delete_string(handle_); }
  Text(const Text&) = delete;
  std::string_view view() const { return view_; }

 private:
  StringHandle handle_;
  std::string_view view_;
};

void boxed_build(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor key = by_channel(to<Tensor>(stack[0])), value = by_channel(to<Tensor>(stack[1]));
  std::vector<Tensor> queries = to<std::vector<Tensor>>(stack[2]);
  for (Tensor& query : queries) query = by_channel(query);
  const Text text(stack[3]);
  const auto capacity = to<std::optional<int64_t>>(stack[4]);
  const auto positions = to<std::optional<Tensor>>(stack[5]);
  std::array<Tensor, 4> built;
  if (build(key, value, queries, spec_of(text.view()), capacity, positions, built)) {
    for (int i = 0; i < 4; ++i) stack[i] = from(built[i]);
    return;
  }
  need_python("spark_reference::build", text.view());
  std::array<StableIValue, 6> again{from(key), from(value), from(queries), from(std::string(text.view())), from(capacity),
      from(positions)};
  call("spark_reference::build", again);
  std::copy_n(again.begin(), 4, stack);
}

// `step`, or `step_partial`, which returns the log-sum-exp too.
template <bool PARTIAL>
void boxed_step(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* name = PARTIAL ? "spark_reference::step_partial" : "spark_reference::step";
  const Text text(stack[12]);
  const StepOperands o{
      by_channel(to<Tensor>(stack[0])), by_channel(to<Tensor>(stack[1])), by_channel(to<Tensor>(stack[2])),
      to<Tensor>(stack[3]), to<Tensor>(stack[4]), to<Tensor>(stack[5]), to<Tensor>(stack[6]), to<std::optional<Tensor>>(stack[7]),
      to<std::optional<Tensor>>(stack[8]), to<std::optional<int64_t>>(stack[9]),
      to<std::optional<int64_t>>(stack[10]), to<std::optional<Tensor>>(stack[11]), text.view()};
  std::optional<Tensor> lse;
  if (const auto output = step(o, spec_of(text.view()), PARTIAL ? &lse : nullptr)) {
    stack[0] = from(*output);
    if constexpr (PARTIAL) stack[1] = from(*lse);
    return;
  }
  need_python(name, text.view());
  std::array<StableIValue, 13> again{
      from(o.query), from(o.new_key), from(o.new_value), from(o.key_pages), from(o.key_head), from(o.value_pages),
      from(o.value_head), from(o.mask), from(o.sinks), from(o.causal_offset), from(o.keep), from(o.position),
      from(std::string(text.view()))};
  call(name, again);
  std::copy_n(again.begin(), PARTIAL ? 2 : 1, stack);
}

#ifdef SPARK_DEFINE_OPERATORS
void boxed_evict(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor key = to<Tensor>(stack[0]);
  const auto queries = to<std::vector<Tensor>>(stack[1]);  // who takes an argument out frees it
  const auto mask = to<std::optional<Tensor>>(stack[2]);
  const auto causal_offset = to<std::optional<int64_t>>(stack[3]);
  const Text text(stack[4]);
  need_python("spark::evict", text.view());
}
#endif

}  // namespace
}  // namespace spark

#ifdef SPARK_DEFINE_OPERATORS
// As spark_compile/ops.py has them, which a test compares.
STABLE_TORCH_LIBRARY(spark, m) {
  m.def(
      "evict(Tensor key, Tensor[] queries, Tensor? attn_mask, SymInt? causal_offset, str spec) -> Tensor");
  m.def(
      "build(Tensor key, Tensor value, Tensor[] queries, str spec, SymInt? capacity, "
      "Tensor? positions=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "step(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key_pages, Tensor(b!) key_head, "
      "Tensor(c!) value_pages, Tensor(d!) value_head, Tensor? attn_mask, Tensor? sinks, "
      "SymInt? causal_offset, SymInt? keep, Tensor? position, str spec) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spark, CPU, m) { m.impl("evict", &spark::boxed_evict); }
#endif

STABLE_TORCH_LIBRARY_IMPL(spark, CPU, m) {
  m.impl("build", &spark::boxed_build);
  m.impl("step", &spark::boxed_step<false>);
#ifndef SPARK_DEFINE_OPERATORS  // exported programs spread no cache over ranks
  m.impl("step_partial", &spark::boxed_step<true>);
#endif
}
