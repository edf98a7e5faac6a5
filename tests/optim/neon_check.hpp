// What neon_check.cpp draws and compares: arrays of all kinds of elements, and what kernels wrote.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "optim/dispatch.hpp"
#include "optim/elements.hpp"

namespace checks {

using namespace spillover;

using Random = std::mt19937;  // The standard says what it gives; distributions it leaves open.

// ---- values ----

// The first three are those of ElementType.
enum class Kind { kFloat32, kBFloat16, kFloat16, kRemainder, kCode };
constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kBFloat16,
                                  ElementType::kFloat16};
constexpr const char* kTypeNames[] = {"fp32", "bf16", "fp16"};

constexpr Kind kind_of(ElementType type) {
  return static_cast<Kind>(type);
}

constexpr size_t size_bytes_of(Kind kind) {
  return kind == Kind::kFloat32 ? 4 : kind == Kind::kCode ? 1 : 2;
}

// In a block with a value that is not finite all moments of 8 bits are alike, so most have none.
enum class Content { kOrdinary, kRarelySpecial, kSpecial, kAnyBits };
constexpr Content kContents[] = {Content::kOrdinary, Content::kRarelySpecial, Content::kSpecial,
                                 Content::kAnyBits};

// NaNs, infinities, zeros, denormals; the largest numbers; where halves overflow, become denormal
// and vanish.
constexpr uint32_t kSpecials[] = {0x7fc00000, 0xffc12345, 0x7f800001, 0x7fbfffff, 0x7f800000,
                                  0xff800000, 0x00000000, 0x80000000, 0x00000001, 0x807fffff,
                                  0x00800000, 0x7f7fffff, 0xff7fffff, 0x477fefff, 0x477ff000,
                                  0xc7800000, 0x38800000, 0x387fffff, 0x33800000, 0x33000001,
                                  0x33000000, 0xb2ffffff, 0x3f800000, 0x7effffff, 0x1e3ce508};
constexpr uint16_t kSpecialHalves[] = {0x7e00, 0xfe01, 0x7c01, 0x7c00, 0xfc00, 0x0000,
                                       0x8000, 0x0001, 0x83ff, 0x0400, 0x7bff, 0x3c00};

inline bool is_special(Content content, Random& random) {
  if (content == Content::kRarelySpecial) return random() % 512 == 0;
  return content == Content::kSpecial && random() % 2 == 0;
}

inline uint32_t draw_float(Content content, Random& random) {
  const uint32_t bits = random();
  if (content == Content::kAnyBits) return bits;
  if (is_special(content, random)) return kSpecials[bits % std::size(kSpecials)];
  const uint32_t kind = random() % 32;
  if (kind < 2) return bits & 0x80000000U;
  if (kind == 2) return bits & 0x807fffffU;
  const uint32_t exponent = 127 - 20 + random() % 24;
  return (bits & 0x807fffffU) | exponent << 23;
}

inline uint32_t draw_half(Content content, Random& random) {
  const uint32_t bits = random() & 0xffff;
  if (content == Content::kAnyBits) return bits;
  if (is_special(content, random)) return kSpecialHalves[bits % std::size(kSpecialHalves)];
  const uint32_t kind = random() % 32;
  if (kind < 2) return bits & 0x8000;
  if (kind == 2) return bits & 0x83ff;
  const uint32_t exponent = 1 + random() % 17;
  return (bits & 0x83ff) | exponent << 10;
}

inline uint32_t draw(Kind kind, Content content, Random& random) {
  if (kind == Kind::kFloat32) return draw_float(content, random);
  if (kind == Kind::kBFloat16) return draw_float(content, random) >> 16;
  if (kind == Kind::kFloat16) return draw_half(content, random);
  return random();
}

// Every NaN as the same one.
inline uint32_t without_payload(Kind kind, uint32_t bits) {
  switch (kind) {
    case Kind::kFloat32:
      return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits;
    case Kind::kBFloat16:
      return (bits & 0x7fff) > 0x7f80 ? 0x7fc0 : bits;
    case Kind::kFloat16:
      return (bits & 0x7fff) > 0x7c00 ? 0x7e00 : bits;
    default:
      return bits;
  }
}

// ---- arrays ----

// Elements that begin some bytes behind the start of a cache line, between bytes that nobody may
// change. A copy is aligned alike.
class Array {
 public:
  Array() = default;
  Array(Kind kind, size_t count, size_t offset_bytes)
      : kind_(kind),
        count_(count),
        begin_(sizeof(Line) + offset_bytes),
        lines_((begin_ + size_bytes()) / sizeof(Line) + 2) {
    std::memset(lines_.data(), kBeside, lines_.size() * sizeof(Line));
  }

  Kind kind() const { return kind_; }
  size_t count() const { return count_; }
  size_t size_bytes() const { return count_ * size_bytes_of(kind_); }
  void* data() { return reinterpret_cast<char*>(lines_.data()) + begin_; }
  const void* data() const { return reinterpret_cast<const char*>(lines_.data()) + begin_; }
  template <class T>
  T* as() {
    return static_cast<T*>(data());
  }

  uint32_t get(size_t i) const {
    uint32_t bits = 0;
    const size_t bytes = size_bytes_of(kind_);
    std::memcpy(&bits, static_cast<const char*>(data()) + i * bytes, bytes);
    return bits;
  }
  void set(size_t i, uint32_t bits) {
    const size_t bytes = size_bytes_of(kind_);
    std::memcpy(static_cast<char*>(data()) + i * bytes, &bits, bytes);
  }

  void fill(Content content, Random& random) {
    for (size_t i = 0; i < count_; ++i) set(i, draw(kind_, content, random));
  }
  void drop_signs() {
    const uint32_t sign = kind_ == Kind::kFloat32 ? 0x80000000U : 0x8000U;
    for (size_t i = 0; i < count_; ++i) set(i, get(i) & ~sign);
  }

  bool is_intact() const {
    const char* all = reinterpret_cast<const char*>(lines_.data());
    const char* end = all + lines_.size() * sizeof(Line);
    const auto is_beside = [](char byte) { return byte == kBeside; };
    return std::all_of(all, all + begin_, is_beside) &&
           std::all_of(all + begin_ + size_bytes(), end, is_beside);
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  static constexpr char kBeside = 0x5a;

  Kind kind_ = Kind::kFloat32;
  size_t count_ = 0;
  size_t begin_ = 0;
  std::vector<Line> lines_;
};

inline Array drawn(Kind kind, size_t count, size_t offset_bytes, Content content, Random& random) {
  Array array(kind, count, offset_bytes);
  array.fill(content, random);
  return array;
}

inline Array floats(std::span<const uint32_t> bits, size_t offset_bytes = 0) {
  Array array(Kind::kFloat32, bits.size(), offset_bytes);
  for (size_t i = 0; i < bits.size(); ++i) array.set(i, bits[i]);
  return array;
}

// ---- comparison ----

inline int g_failure_count = 0;
inline uint64_t g_digest = 0;

inline void fail(const std::string& sentence) {
  if (++g_failure_count <= 20) std::printf("FAILED: %s\n", sentence.c_str());
}

// What a kernel wrote.
struct Results {
  struct Part {
    const char* name;
    std::vector<uint32_t> bits;
  };
  std::vector<Part> parts;
  bool is_intact = true;

  void add(const char* name, const Array& array) {
    is_intact = is_intact && array.is_intact();
    Part& part = parts.emplace_back(Part{name, {}});
    part.bits.reserve(array.count());
    for (size_t i = 0; i < array.count(); ++i)
      part.bits.push_back(without_payload(array.kind(), array.get(i)));
  }

  // Codes under a scale that is NaN all stand for NaN.
  void add(const char* name, const Array& codes, const Array& scales) {
    add("scales", scales);
    add(name, codes);
    const std::vector<uint32_t>& scale_bits = parts[parts.size() - 2].bits;
    std::vector<uint32_t>& code_bits = parts.back().bits;
    for (size_t i = 0; i < code_bits.size(); ++i)
      if (scale_bits[i / kBlockElements] == 0x7fc00000) code_bits[i] = 0;
  }

  void add(const char* name, double value) {
    const auto bits =
        std::bit_cast<uint64_t>(value == value ? value : std::numeric_limits<double>::quiet_NaN());
    parts.push_back({name, {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}});
  }
};

inline void compare(const std::string& label, const Results& expected, const Results& found) {
  if (!found.is_intact) fail(label + " writes beside an array");
  for (size_t part = 0; part < expected.parts.size(); ++part) {
    const auto& [name, wanted] = expected.parts[part];
    const std::vector<uint32_t>& bits = found.parts[part].bits;
    const auto [at, other] = std::mismatch(wanted.begin(), wanted.end(), bits.begin());
    if (at == wanted.end()) continue;
    char text[96];
    std::snprintf(text, sizeof text, " of %zu has bits %08x, portable ones %08x",
                  static_cast<size_t>(at - wanted.begin()), *other, *at);
    fail(label + ": " + name + text);
  }
}

// FNV-1a by words.
inline void digest(const Results& results) {
  for (const Results::Part& part : results.parts)
    for (const uint32_t bits : part.bits) g_digest = (g_digest ^ bits) * 0x100000001b3U;
}

inline void print_digest(const std::string& name) {
  std::printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(g_digest));
  g_digest = 0;
}

// run starts from the same inputs each time and returns what it wrote.
inline void check(const std::string& name, const std::function<Results()>& run) {
  Results expected;
  for (const std::string& set : instruction_sets()) {
    set_instruction_set(set);
    const Results found = run();
    if (set == "portable") expected = found;
    compare(set + ", " + name, expected, found);
  }
  digest(expected);
}

}  // namespace checks
