// torch's threads.
#pragma once

#include <pthread.h>

#include <algorithm>

#include <torch/csrc/stable/ops.h>

namespace spark {

// Whether this process is the child of a fork: OpenMP would wait for threads that it does not have.
inline bool forked = false;
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Calls f(first, last) for ranges of [begin, end), of at least `grain` where there are several.
template <class Function>
void parallel(int64_t begin, int64_t end, int64_t grain, const Function& f) {
  torch::stable::parallel_for(begin, end, forked ? std::max<int64_t>(end - begin, 0) : grain, f);
}

inline int64_t thread_count() { return forked ? 1 : torch::stable::get_num_threads(); }

}  // namespace spark
