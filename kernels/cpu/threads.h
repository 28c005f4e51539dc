// torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace spark {

// Calls f(first, last) for ranges of [begin, end), of at least `grain` where there are several.
template <class Function>
void parallel(int64_t begin, int64_t end, int64_t grain, const Function& f) {
  torch::stable::parallel_for(begin, end, grain, f);
}

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace spark
