// Asynchronous copies to shared memory. They land when they are waited for, not before, so that a
// missing wait shows.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

namespace fastjac::host {

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

// Of one thread: the copies since the last commit, and the groups committed before.
inline thread_local std::vector<Copy> started;
inline thread_local std::deque<std::vector<Copy>> committed;

}  // namespace fastjac::host

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((size != 4 && size != 8 && size != 16) || addresses % size != 0) {
    std::fprintf(stderr, "asynchronous copy of %zu bytes at an address that does not fit\n", size);
    std::abort();
  }
  fastjac::host::started.push_back({to, from, size});
}

inline void __pipeline_commit() {
  fastjac::host::committed.push_back(std::move(fastjac::host::started));
  fastjac::host::started.clear();
}

inline void __pipeline_wait_prior(size_t groups) {
  auto& committed = fastjac::host::committed;
  for (; committed.size() > groups; committed.pop_front()) {
    for (const auto& copy : committed.front()) std::memcpy(copy.to, copy.from, copy.size);
  }
}
