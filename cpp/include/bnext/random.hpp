// The counter-based random numbers behind dropout.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace bnext {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
std::array<std::uint32_t, 4> philox4x32_10(const std::array<std::uint32_t, 4>& counter,
                                           const std::array<std::uint32_t, 2>& key);

// A seed, and the number of the next call that will draw from it. Safe to share between threads:
// each call gets an offset of its own.
class Generator {
 public:
  explicit Generator(std::uint64_t seed, std::uint64_t offset = 0) : seed_(seed), offset_(offset) {}

  std::uint64_t seed() const { return seed_; }
  std::uint64_t offset() const { return offset_; }
  std::uint64_t next() { return offset_++; }
  void set(std::uint64_t seed, std::uint64_t offset) {
    seed_ = seed;
    offset_ = offset;
  }

 private:
  std::atomic<std::uint64_t> seed_;
  std::atomic<std::uint64_t> offset_;
};

}  // namespace bnext
