// Turning numbers of the run into constants of the compiler.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#define MOEQ_INLINE static inline __attribute__((always_inline))
// Inlined into a larger function, gcc 12 keeps arrays of sums in memory instead of registers.
#define MOEQ_NOINLINE static __attribute__((noinline))

namespace moeq {

// Call f(std::integral_constant<int, i>) for i = 0 .. n - 1.
template <int n, class F>
MOEQ_INLINE void repeat(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

// Call f(std::integral_constant<int, n>) for n = value, which is one of first .. last.
template <int first, int last, class F>
MOEQ_INLINE void with_constant(int value, F&& f) {
  if (value == first) return f(std::integral_constant<int, first>{});
  if constexpr (first < last) return with_constant<first + 1, last>(value, f);
  __builtin_unreachable();
}

// Call f(std::integral_constant<int, size>, first) for about equal pieces, which make up `count`,
// of at most `largest`. More than `fewest` in all make larger pieces, and fewer functions.
template <int largest, int fewest = 0, class F>
MOEQ_INLINE void pieces(int count, F&& f) {
  constexpr int smallest = std::min(fewest + 1, (largest + 1) / 2);
  const int number = (count + largest - 1) / largest;
  for (int piece = 0, first = 0; piece < number; ++piece) {
    const int size = count / number + (piece < count % number);
    with_constant<smallest, largest>(
        size, [&](auto constant) __attribute__((always_inline)) { f(constant, first); });
    first += size;
  }
}

}  // namespace moeq

// The body of repeat(): `index` is the constant.
#define MOEQ_LAMBDA [&](auto index) __attribute__((always_inline))
