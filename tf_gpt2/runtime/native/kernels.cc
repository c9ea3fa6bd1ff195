// Products of a few float rows with 8-bit, 4-bit and float matrices, y = x w', and attention of a few new positions, for
// functions that XLA compiles. Each weight is read once for up to eight rows, and of a cache only what is in sight. A row's
// result is the same whatever its neighbours.
//
// With integers, each row is rounded to 8 bits, a scale per block of columns: 16 columns for 8-bit weights, 32 for 4-bit ones. A block's
// products are summed in integers, exactly; the blocks' sums, times their scales, are added one after the other in
// float32. So a row's result is the same on any processor, and with any number of threads. With floats, a sum has as many
// parts as a register has lanes, so only on processors with the same instruction set.
//
// 8-bit weights are int8 (n_out, n_in), at least -127, with a float32 scale per output. 4-bit weights are uint8
// (n_out, n_groups * 16): byte i of a group of 32 has the number of column i in its lower half and that of column 16 + i
// in its upper half, plus 8 each; scales are bfloat16 (n_groups, n_out).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <thread>

#include "xla_ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace {

constexpr int BLOCK_8 = 16, BLOCK_4 = 32;  // columns with one scale
constexpr int TILE_BYTES = 64;             // of one output, read at a time: four blocks
constexpr int32_t INFINITY_BITS = 0x7f800000;
constexpr float SMALLEST = 1e-30f;  // a block of smaller numbers is one of zeros: 127 / x must be finite
constexpr int MOST_ROWS_TOGETHER = 8;  // rows that share one reading of the weights, on any processor
constexpr int ROWS_AT_ONCE = 128;      // so many rounded rows stay in the second-level cache

const int32_t LANE_NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One product, and its rounded rows.
struct Product {
  const float* x;
  const uint8_t* weights;
  const float* output_scales;    // of 8-bit weights, (n_out,)
  const uint16_t* group_scales;  // of 4-bit weights, (n_groups, n_out)
  float* y;
  int n_rows, n_in, n_out, row_bytes, n_groups;
  int n_blocks;          // of a row, filled up to whole tiles
  int8_t* rounded;       // (n_rows, n_blocks, block)
  float* scales;         // (n_rows, n_blocks)
  int32_t* corrections;  // (n_rows, n_blocks), what makes up for the offset of the weights
};

// One product of floats: x (n_rows, n_in), weights (n_out, n_in) -> y (n_rows, n_out).
struct FloatProduct {
  const float *x, *weights;
  float* y;
  int n_rows, n_in, n_out;
};

// The weights of attention: q (n_heads, n_queries, width), k (n_heads, n_keys, width), mask (n_heads or 1, n_queries,
// n_keys) -> weights (n_heads, n_queries, n_keys). Heads of all rows count.
struct Scores {
  const float *q, *k;
  const uint8_t* mask;
  float* weights;
  int n_heads, n_masks, n_queries, n_keys, width;
};

// What attention sums: weights (n_heads, n_queries, n_keys), v (n_heads, n_keys, width) -> y (n_heads, n_queries, width).
struct WeightedSum {
  const float *weights, *v;
  float* y;
  int n_heads, n_queries, n_keys, width;
};

typedef void Round(const Product&, int offset, int first_row, int end_row);
typedef void Multiply(const Product&, void* panel, int first_row, int end_row, int first, int end);
typedef void MultiplyFloats(const FloatProduct&, int first, int end);
typedef void Weigh(const Scores&, int head);
typedef void SumValues(const WeightedSum&, int head);

// The functions for one instruction set.
struct Kernels {
  int lanes, offset_8;
  Round *round_8, *round_4;
  Multiply *multiply_8, *multiply_4;
  MultiplyFloats* multiply_floats;
  Weigh* weigh;
  SumValues* sum_values;
};

// ---- portable

namespace portable {
constexpr int LANES = 4, MOST_ROWS = 4, OFFSET = 0;
typedef int32_t Words __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

static inline Floats multiply_add(Floats a, Floats b, Floats sums) { return sums + a * b; }

static inline Words prepare(Words line) { return line; }

static inline Words dot8(Words sums, Words line, int32_t x) {
  int8_t weights[16], numbers[4];
  memcpy(weights, &line, sizeof weights);
  memcpy(numbers, &x, sizeof numbers);
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 4; ++i) sums[lane] += weights[4 * lane + i] * numbers[i];
  return sums;
}

static inline Words dot4(Words sums, Words line, int32_t x) { return dot8(sums, line, x); }

static inline void transpose(const uint8_t* from, size_t stride, uint32_t (*lines)[LANES]) {
  for (int lane = 0; lane < LANES; ++lane)
    for (int i = 0; i < 16; ++i) memcpy(&lines[i][lane], from + lane * stride + 4 * i, 4);
}

#include "product.inc"
#include "float_product.inc"
#include "attention.inc"
}  // namespace portable

#if defined(__x86_64__)

// ---- AVX2

#pragma GCC push_options
#pragma GCC target("avx2,fma")

// Transposes 8 x 8 words.
static inline void transpose_8(const __m256i in[8], __m256i out[8]) {
  __m256i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(in[i], in[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    out[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

static inline void transpose_8_rows(const uint8_t* from, size_t stride, uint32_t (*lines)[8]) {
  for (int half = 0; half < 2; ++half) {
    __m256i in[8], out[8];
    for (int i = 0; i < 8; ++i) in[i] = _mm256_loadu_si256((const __m256i*)(from + i * stride + 32 * half));
    transpose_8(in, out);
    for (int i = 0; i < 8; ++i) _mm256_storeu_si256((__m256i*)lines[8 * half + i], out[i]);
  }
}

namespace avx2 {
constexpr int LANES = 8, MOST_ROWS = 4, OFFSET = 0;
typedef int32_t Words __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

static inline Floats multiply_add(Floats a, Floats b, Floats sums) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sums);
}

static inline Words prepare(Words line) { return line; }

// Weights in [0, 127] times x in [-127, 127]: two products fit 16 bits.
static inline Words dot4(Words sums, Words line, int32_t x) {
  __m256i pairs = _mm256_maddubs_epi16((__m256i)line, _mm256_set1_epi32(x));
  return sums + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

static inline Words dot8(Words sums, Words line, int32_t x) {
  __m256i w = (__m256i)line, signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), w);
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x);
  return sums + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

static inline void transpose(const uint8_t* from, size_t stride, uint32_t (*lines)[LANES]) {
  transpose_8_rows(from, stride, lines);
}

#include "product.inc"
#include "float_product.inc"
#include "attention.inc"
}  // namespace avx2
#pragma GCC pop_options

// ---- AVX-VNNI: AVX2 with 8-bit dot products

#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
namespace avx_vnni {
constexpr int LANES = 8, MOST_ROWS = 4, OFFSET = 128;
typedef int32_t Words __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

static inline Floats multiply_add(Floats a, Floats b, Floats sums) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sums);
}

static inline Words prepare(Words line) { return line ^ (Words{} + (int32_t)0x80808080); }

static inline Words dot8(Words sums, Words line, int32_t x) {
  return (Words)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)line, _mm256_set1_epi32(x));
}

static inline Words dot4(Words sums, Words line, int32_t x) { return dot8(sums, line, x); }

static inline void transpose(const uint8_t* from, size_t stride, uint32_t (*lines)[LANES]) {
  transpose_8_rows(from, stride, lines);
}

#include "product.inc"
#include "float_product.inc"
#include "attention.inc"
}  // namespace avx_vnni
#pragma GCC pop_options

// ---- AVX-512 with 8-bit dot products

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,prefer-vector-width=512")
namespace avx512_vnni {
constexpr int LANES = 16, MOST_ROWS = 8, OFFSET = 128;
typedef int32_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

static inline Floats multiply_add(Floats a, Floats b, Floats sums) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sums);
}

static inline Words prepare(Words line) { return line ^ (Words{} + (int32_t)0x80808080); }

static inline Words dot8(Words sums, Words line, int32_t x) {
  return (Words)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)line, _mm512_set1_epi32(x));
}

static inline Words dot4(Words sums, Words line, int32_t x) { return dot8(sums, line, x); }

// Reads 16 bytes of rows 0, 4, 8 and 12.
static inline __m512i gather_rows(const uint8_t* from, size_t stride) {
  __m512i rows = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from));
  rows = _mm512_mask_broadcast_i32x4(rows, 0x00f0, _mm_loadu_si128((const __m128i*)(from + 4 * stride)));
  rows = _mm512_mask_broadcast_i32x4(rows, 0x0f00, _mm_loadu_si128((const __m128i*)(from + 8 * stride)));
  return _mm512_mask_broadcast_i32x4(rows, 0xf000, _mm_loadu_si128((const __m128i*)(from + 12 * stride)));
}

// Reads are arranged so that words need be moved only within quarters of 128 bits, which is four times 4 x 4 words.
static inline void transpose(const uint8_t* from, size_t stride, uint32_t (*lines)[LANES]) {
  for (int i = 0; i < 4; ++i) {
    __m512i rows[4];
    for (int j = 0; j < 4; ++j) rows[j] = gather_rows(from + j * stride + 16 * i, stride);
    __m512i low_01 = _mm512_unpacklo_epi32(rows[0], rows[1]), low_23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    __m512i high_01 = _mm512_unpackhi_epi32(rows[0], rows[1]), high_23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    _mm512_storeu_si512(lines[4 * i], _mm512_unpacklo_epi64(low_01, low_23));
    _mm512_storeu_si512(lines[4 * i + 1], _mm512_unpackhi_epi64(low_01, low_23));
    _mm512_storeu_si512(lines[4 * i + 2], _mm512_unpacklo_epi64(high_01, high_23));
    _mm512_storeu_si512(lines[4 * i + 3], _mm512_unpackhi_epi64(high_01, high_23));
  }
}

#include "product.inc"
#include "float_product.inc"
#include "attention.inc"
}  // namespace avx512_vnni
#pragma GCC pop_options

#elif defined(__aarch64__) && defined(__linux__)

// ---- Arm with 8-bit dot products

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
namespace neon_dotprod {
constexpr int LANES = 4, MOST_ROWS = 8, OFFSET = 0;
typedef int32_t Words __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

static inline Floats multiply_add(Floats a, Floats b, Floats sums) {
  return (Floats)vfmaq_f32((float32x4_t)sums, (float32x4_t)a, (float32x4_t)b);
}

static inline Words prepare(Words line) { return line; }

static inline Words dot8(Words sums, Words line, int32_t x) {
  return (Words)vdotq_s32((int32x4_t)sums, (int8x16_t)line, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}

static inline Words dot4(Words sums, Words line, int32_t x) { return dot8(sums, line, x); }

static inline void transpose(const uint8_t* from, size_t stride, uint32_t (*lines)[LANES]) {
  for (int i = 0; i < 4; ++i) {
    uint32x4_t rows[4];
    for (int lane = 0; lane < 4; ++lane) rows[lane] = vreinterpretq_u32_u8(vld1q_u8(from + lane * stride + 16 * i));
    uint64x2_t low_01 = vreinterpretq_u64_u32(vzip1q_u32(rows[0], rows[1]));
    uint64x2_t low_23 = vreinterpretq_u64_u32(vzip1q_u32(rows[2], rows[3]));
    uint64x2_t high_01 = vreinterpretq_u64_u32(vzip2q_u32(rows[0], rows[1]));
    uint64x2_t high_23 = vreinterpretq_u64_u32(vzip2q_u32(rows[2], rows[3]));
    vst1q_u32(lines[4 * i], vreinterpretq_u32_u64(vzip1q_u64(low_01, low_23)));
    vst1q_u32(lines[4 * i + 1], vreinterpretq_u32_u64(vzip2q_u64(low_01, low_23)));
    vst1q_u32(lines[4 * i + 2], vreinterpretq_u32_u64(vzip1q_u64(high_01, high_23)));
    vst1q_u32(lines[4 * i + 3], vreinterpretq_u32_u64(vzip2q_u64(high_01, high_23)));
  }
}

#include "product.inc"
#include "float_product.inc"
#include "attention.inc"
}  // namespace neon_dotprod
#pragma GCC pop_options

#endif

// ---- which instruction set

struct InstructionSet {
  const char* name;
  bool is_here;
  const Kernels* kernels;
};

// Returns all that this file has for the kind of processor, the fastest first.
const InstructionSet* instruction_sets() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512_vnni",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni"),
       &avx512_vnni::kernels},
      {"avx_vnni",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avxvnni"),
       &avx_vnni::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kernels},
#elif defined(__aarch64__) && defined(__linux__)
      {"neon_dotprod", (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0, &neon_dotprod::kernels},
#endif
      {"portable", true, &portable::kernels},
      {nullptr, false, nullptr},
  };
  return sets;
}

// Returns the kernels of an instruction set, or the fastest if `name` is null; null where the processor lacks it.
const Kernels* find_kernels(const char* name) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->is_here && (!name || strcmp(name, set->name) == 0)) return set->kernels;
  return nullptr;
}

// ---- memory

// Memory of one thread, kept for its next product: fresh memory would have to be asked for page by page.
class Scratch {
 public:
  ~Scratch() { free(memory_); }

  char* at_least(size_t n_bytes) {
    if (n_bytes > size_) {
      free(memory_);
      size_ = 0;
      memory_ = nullptr;
      if (posix_memalign(&memory_, 64, n_bytes) != 0) throw std::bad_alloc();
      size_ = n_bytes;
    }
    return (char*)memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch rows_memory, panel_memory;

// ---- threads

// XLA's threads, or none: then the caller computes alone.
struct Pool {
  const xla_ffi::Api* api = nullptr;
  xla_ffi::Context* context = nullptr;
  int n_threads = 1;

  bool schedule(void (*run)(void*), void* data) const {
    xla_ffi::Task task = {xla_ffi::head<xla_ffi::Task>(), context, run, data};
    xla_ffi::Error* error = api->schedule(&task);
    if (!error) return true;
    xla_ffi::OldError old = {xla_ffi::head<xla_ffi::OldError>(), error};
    api->destroy_error(&old);
    return false;
  }
};

// Pieces of work, in as many shares as there are threads. A thread claims those of one share, one after the other, because
// it has read ahead of them, and then what is left of the other shares.
struct Pieces {
  void (*work)(const void* of, int piece);
  const void* of;
  int n, n_shares;
  std::unique_ptr<std::atomic<int>[]> n_claimed;
  std::atomic<int> n_done{0};

  int first_of(int share) const { return (int64_t)n * share / n_shares; }

  void take_all(int own_share) {
    for (int i = 0; i < n_shares; ++i) {
      const int share = (own_share + i) % n_shares, first = first_of(share), end = first_of(share + 1);
      for (int piece; (piece = first + n_claimed[share].fetch_add(1, std::memory_order_relaxed)) < end;) {
        work(of, piece);
        n_done.fetch_add(1, std::memory_order_release);
      }
    }
  }
};

// Calls `work` with each number below n, on several threads. The caller works too, and then waits only for pieces that
// others are at: a thread of the pool that never comes, because other requests have it, holds nobody up. One that comes
// late finds no piece left and touches nothing but the counters, which it owns a share of.
template <class Work>
void in_pieces(const Pool& pool, int n, const Work& work) {
  struct Task {
    std::shared_ptr<Pieces> pieces;
    int share;
  };
  auto pieces = std::make_shared<Pieces>();
  pieces->work = [](const void* of, int piece) { (*(const Work*)of)(piece); };
  pieces->of = &work;
  pieces->n = n;
  pieces->n_shares = pool.n_threads < n ? pool.n_threads : n;
  pieces->n_claimed.reset(new std::atomic<int>[pieces->n_shares]());
  for (int i = 1; i < pieces->n_shares; ++i) {
    Task* task = new Task{pieces, i};
    auto run = [](void* data) {
      std::unique_ptr<Task> task((Task*)data);
      task->pieces->take_all(task->share);
    };
    if (!pool.schedule(run, task)) {
      delete task;
      break;
    }
  }
  pieces->take_all(0);
  for (int turn = 0; pieces->n_done.load(std::memory_order_acquire) < n; ++turn) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (turn > 1000) std::this_thread::yield();
  }
}

// ---- a product

int divide_up(int a, int b) { return (a + b - 1) / b; }

// Gives a product the memory for its rounded rows: scales, corrections, numbers.
void take_memory(Product& p, int block) {
  p.n_blocks = divide_up(p.row_bytes, TILE_BYTES) * 4;
  size_t n = (size_t)p.n_rows * p.n_blocks;
  char* memory = rows_memory.at_least(n * (sizeof(float) + sizeof(int32_t) + block) + 64);
  p.scales = (float*)memory;
  p.corrections = (int32_t*)(p.scales + n);
  p.rounded = (int8_t*)(p.corrections + n);
}

void run(Product p, bool is_4_bit, const Kernels& kernels, const Pool& pool) {
  if (p.n_rows == 0 || p.n_out == 0) return;
  const int block = is_4_bit ? BLOCK_4 : BLOCK_8, offset = is_4_bit ? 8 : kernels.offset_8;
  take_memory(p, block);
  Round* round = is_4_bit ? kernels.round_4 : kernels.round_8;
  auto round_some = [&](int piece) {
    const int row = piece * MOST_ROWS_TOGETHER, end_row = row + MOST_ROWS_TOGETHER;
    round(p, offset, row, end_row < p.n_rows ? end_row : p.n_rows);
  };
  in_pieces(pool, divide_up(p.n_rows, MOST_ROWS_TOGETHER), round_some);

  Multiply* multiply = is_4_bit ? kernels.multiply_4 : kernels.multiply_8;
  const int n_panels = divide_up(p.n_out, kernels.lanes);
  // Several pieces for each thread, so that one that is late does not hold up the others for long.
  const int panels_per_piece = divide_up(n_panels, 8 * pool.n_threads), n_parts = divide_up(n_panels, panels_per_piece);
  auto multiply_part = [&](int piece) {
    const int first = piece % n_parts * panels_per_piece * kernels.lanes, row = piece / n_parts * ROWS_AT_ONCE;
    const int end = first + panels_per_piece * kernels.lanes, end_row = row + ROWS_AT_ONCE;
    void* panel = panel_memory.at_least((size_t)p.n_blocks / 4 * TILE_BYTES * kernels.lanes);
    multiply(p, panel, row, end_row < p.n_rows ? end_row : p.n_rows, first, end < p.n_out ? end : p.n_out);
  };
  in_pieces(pool, n_parts * divide_up(p.n_rows, ROWS_AT_ONCE), multiply_part);
}

void run_floats(const FloatProduct& p, const Kernels& kernels, const Pool& pool) {
  if (p.n_rows == 0 || p.n_out == 0) return;
  const int n_each = divide_up(p.n_out, 8 * pool.n_threads);  // several pieces for each thread, as above
  auto multiply_part = [&](int piece) {
    const int first = piece * n_each, end = first + n_each;
    kernels.multiply_floats(p, first, end < p.n_out ? end : p.n_out);
  };
  in_pieces(pool, divide_up(p.n_out, n_each), multiply_part);
}

void run_weights(const Scores& p, const Kernels& kernels, const Pool& pool) {
  in_pieces(pool, p.n_heads, [&](int head) { kernels.weigh(p, head); });
}

void run_sum(const WeightedSum& p, const Kernels& kernels, const Pool& pool) {
  in_pieces(pool, p.n_heads, [&](int head) { kernels.sum_values(p, head); });
}

// Makes a product of plain arrays.
Product make_product(const float* x, const void* weights, const void* scales, float* y, int n_rows, int n_in, int n_out,
                     bool is_4_bit) {
  Product p = {};
  p.x = x, p.y = y, p.n_rows = n_rows, p.n_in = n_in, p.n_out = n_out;
  p.weights = (const uint8_t*)weights;
  if (is_4_bit) {
    p.n_groups = divide_up(n_in, BLOCK_4), p.row_bytes = 16 * p.n_groups;
    p.group_scales = (const uint16_t*)scales;
  } else {
    p.row_bytes = n_in;
    p.output_scales = (const float*)scales;
  }
  return p;
}

// ---- as XLA calls it

using xla_ffi::Buffer;
using xla_ffi::Call;

xla_ffi::Error* refuse(const Call& call, const char* message) {
  xla_ffi::NewError error = {xla_ffi::head<xla_ffi::NewError>(), message, xla_ffi::INVALID_ARGUMENT};
  return call.api->create_error(&error);
}

// Whether a buffer has a type and sizes; -1 for any size.
bool is_array(const Buffer& buffer, int type, std::initializer_list<int64_t> sizes) {
  auto fits = [](int64_t wanted, int64_t size) { return wanted < 0 || wanted == size; };
  return buffer.type == type && buffer.rank == (int64_t)sizes.size() &&
         std::equal(sizes.begin(), sizes.end(), buffer.sizes, fits);
}

Pool pool_of(const Call& call) {
  int64_t n_threads = 1;
  xla_ffi::ThreadCount count = {xla_ffi::head<xla_ffi::ThreadCount>(), call.context, &n_threads};
  if (xla_ffi::Error* error = call.api->count_threads(&count)) {
    xla_ffi::OldError old = {xla_ffi::head<xla_ffi::OldError>(), error};
    call.api->destroy_error(&old);
    n_threads = 1;
  }
  return {call.api, call.context, (int)(n_threads < 1 ? 1 : n_threads)};
}

// Answers XLA where it asks only which version of the interface a handler is for; returns whether it did.
bool is_question(Call* call) {
  using namespace xla_ffi;
  if (!call->head.extensions || call->head.extensions->type != METADATA) return false;
  Metadata* metadata = ((MetadataExtension*)call->head.extensions)->metadata;
  metadata->version = {head<Version>(), MAJOR, MINOR};
  metadata->traits = 0;
  return true;
}

// x (n_rows, n_in), weights (n_out, bytes), scales -> y (n_rows, n_out)
xla_ffi::Error* product(Call* call, bool is_4_bit) {
  using namespace xla_ffi;
  if (is_question(call)) return nullptr;
  if (call->arguments.n != 3 || call->results.n != 1) return refuse(*call, "expected x, weights, scales -> y");
  const Buffer &x = *call->arguments.buffers[0], &weights = *call->arguments.buffers[1];
  const Buffer &scales = *call->arguments.buffers[2], &y = *call->results.buffers[0];
  if (!is_array(x, F32, {-1, -1})) return refuse(*call, "x must be float32 (n_rows, n_in)");
  const int64_t n_rows = x.sizes[0], n_in = x.sizes[1], n_groups = divide_up(n_in, BLOCK_4);
  if (!is_array(weights, is_4_bit ? U8 : S8, {-1, is_4_bit ? 16 * n_groups : n_in}))
    return refuse(*call, "weights must be int8 (n_out, n_in), or uint8 (n_out, 16 per group of 32)");
  const int64_t n_out = weights.sizes[0];
  if (!is_array(scales, is_4_bit ? BF16 : F32, {is_4_bit ? n_groups : 1, n_out}))
    return refuse(*call, "scales must be float32 (1, n_out), or bfloat16 (n_groups, n_out)");
  if (!is_array(y, F32, {n_rows, n_out})) return refuse(*call, "y must be float32 (n_rows, n_out)");
  try {
    run(make_product((const float*)x.data, weights.data, scales.data, (float*)y.data, n_rows, n_in, n_out, is_4_bit),
        is_4_bit, *find_kernels(nullptr), pool_of(*call));
  } catch (const std::bad_alloc&) {
    return refuse(*call, "no memory for the rounded rows");
  }
  return nullptr;
}

// x (n_rows, n_in), weights (n_out, n_in) -> y (n_rows, n_out)
xla_ffi::Error* product_f(Call* call) {
  using namespace xla_ffi;
  if (is_question(call)) return nullptr;
  if (call->arguments.n != 2 || call->results.n != 1) return refuse(*call, "expected x, weights -> y");
  const Buffer &x = *call->arguments.buffers[0], &weights = *call->arguments.buffers[1];
  const Buffer& y = *call->results.buffers[0];
  if (!is_array(x, F32, {-1, -1})) return refuse(*call, "x must be float32 (n_rows, n_in)");
  if (!is_array(weights, F32, {-1, x.sizes[1]})) return refuse(*call, "weights must be float32 (n_out, n_in)");
  if (!is_array(y, F32, {x.sizes[0], weights.sizes[0]})) return refuse(*call, "y must be float32 (n_rows, n_out)");
  const int n_rows = (int)x.sizes[0], n_in = (int)x.sizes[1], n_out = (int)weights.sizes[0];
  run_floats({(const float*)x.data, (const float*)weights.data, (float*)y.data, n_rows, n_in, n_out},
             *find_kernels(nullptr), pool_of(*call));
  return nullptr;
}

// q (N, T, D), k (N, S, D), mask (N or 1, T, S) -> weights (N, T, S)
xla_ffi::Error* attention_weights(Call* call) {
  using namespace xla_ffi;
  if (is_question(call)) return nullptr;
  if (call->arguments.n != 3 || call->results.n != 1) return refuse(*call, "expected q, k, mask -> weights");
  const Buffer &q = *call->arguments.buffers[0], &k = *call->arguments.buffers[1];
  const Buffer &mask = *call->arguments.buffers[2], &weights = *call->results.buffers[0];
  if (!is_array(q, F32, {-1, -1, -1})) return refuse(*call, "q must be float32 (N, T, D)");
  const int64_t n_heads = q.sizes[0], n_queries = q.sizes[1], width = q.sizes[2];
  if (!is_array(k, F32, {n_heads, -1, width})) return refuse(*call, "k must be float32 (N, S, D)");
  const int64_t n_keys = k.sizes[1];
  if (!is_array(mask, PRED, {-1, n_queries, n_keys}) || (mask.sizes[0] != 1 && mask.sizes[0] != n_heads))
    return refuse(*call, "mask must be bool (N or 1, T, S)");
  if (!is_array(weights, F32, {n_heads, n_queries, n_keys})) return refuse(*call, "weights must be float32 (N, T, S)");
  run_weights({(const float*)q.data, (const float*)k.data, (const uint8_t*)mask.data, (float*)weights.data, (int)n_heads,
               (int)mask.sizes[0], (int)n_queries, (int)n_keys, (int)width},
              *find_kernels(nullptr), pool_of(*call));
  return nullptr;
}

// weights (N, T, S), v (N, S, D) -> y (N, T, D)
xla_ffi::Error* weighted_sum(Call* call) {
  using namespace xla_ffi;
  if (is_question(call)) return nullptr;
  if (call->arguments.n != 2 || call->results.n != 1) return refuse(*call, "expected weights, v -> y");
  const Buffer &weights = *call->arguments.buffers[0], &v = *call->arguments.buffers[1];
  const Buffer& y = *call->results.buffers[0];
  if (!is_array(weights, F32, {-1, -1, -1})) return refuse(*call, "weights must be float32 (N, T, S)");
  const int64_t n_heads = weights.sizes[0], n_queries = weights.sizes[1], n_keys = weights.sizes[2];
  if (!is_array(v, F32, {n_heads, n_keys, -1})) return refuse(*call, "v must be float32 (N, S, D)");
  if (!is_array(y, F32, {n_heads, n_queries, v.sizes[2]})) return refuse(*call, "y must be float32 (N, T, D)");
  run_sum({(const float*)weights.data, (const float*)v.data, (float*)y.data, (int)n_heads, (int)n_queries, (int)n_keys,
           (int)v.sizes[2]},
          *find_kernels(nullptr), pool_of(*call));
  return nullptr;
}

xla_ffi::Error* product_8(Call* call) { return product(call, false); }
xla_ffi::Error* product_4(Call* call) { return product(call, true); }

}  // namespace

// ---- as Python calls it

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Writes the names of the instruction sets that the processor has, the fastest first, separated by spaces.
EXPORTED void tf_gpt2_instruction_sets(char* names, size_t size) {
  size_t length = 0;
  names[0] = 0;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->is_here && length + strlen(set->name) + 2 < size)
      length += snprintf(names + length, size - length, "%s%s", length ? " " : "", set->name);
}

// Computes a product without XLA, on the caller's thread; returns 0, or 1 where the processor lacks the instruction set.
EXPORTED int tf_gpt2_product(const char* instruction_set, int is_4_bit, const float* x, const void* weights,
                             const void* scales, float* y, int n_rows, int n_in, int n_out) {
  const Kernels* kernels = find_kernels(instruction_set);
  if (!kernels) return 1;
  run(make_product(x, weights, scales, y, n_rows, n_in, n_out, is_4_bit), is_4_bit, *kernels, Pool());
  return 0;
}

// The same for floats: x (n_rows, n_in), weights (n_out, n_in) -> y (n_rows, n_out).
EXPORTED int tf_gpt2_float_product(const char* instruction_set, const float* x, const float* weights, float* y,
                                   int n_rows, int n_in, int n_out) {
  const Kernels* kernels = find_kernels(instruction_set);
  if (!kernels) return 1;
  run_floats({x, weights, y, n_rows, n_in, n_out}, *kernels, Pool());
  return 0;
}

// The same for attention: q (N, T, D), k and v (N, S, D), mask (n_masks, T, S) -> weights (N, T, S), y (N, T, D).
EXPORTED int tf_gpt2_attention(const char* instruction_set, const float* q, const float* k, const float* v,
                               const uint8_t* mask, float* weights, float* y, int n_heads, int n_masks, int n_queries,
                               int n_keys, int width) {
  const Kernels* kernels = find_kernels(instruction_set);
  if (!kernels) return 1;
  run_weights({q, k, mask, weights, n_heads, n_masks, n_queries, n_keys, width}, *kernels, Pool());
  run_sum({weights, v, y, n_heads, n_queries, n_keys, width}, *kernels, Pool());
  return 0;
}

// Registers the kernels with XLA. Writes why not, or nothing. Code that was compiled and kept on disk calls them by these
// names: kernels that take other arguments, or give other results, need other names.
EXPORTED void tf_gpt2_register(const void* api_table, char* why_not, size_t size) {
  using namespace xla_ffi;
  const Api* api = (const Api*)api_table;
  why_not[0] = 0;
  if (api->version.major != MAJOR || api->version.minor != MINOR || api->head.struct_size < sizeof(Api)) {
    snprintf(why_not, size, "they are for version %d.%d of XLA's foreign function interface, and TensorFlow has %d.%d",
             MAJOR, MINOR, api->version.major, api->version.minor);
    return;
  }
  struct {
    const char* name;
    Handler* handler;
  } const all[] = {{"tf_gpt2_product_8_v1", product_8},
                   {"tf_gpt2_product_4_v1", product_4},
                   {"tf_gpt2_product_f_v1", product_f},
                   {"tf_gpt2_attention_weights_v1", attention_weights},
                   {"tf_gpt2_weighted_sum_v1", weighted_sum}};
  for (const auto& one : all) {
    Registration registration = {head<Registration>(), {one.name, strlen(one.name)}, {"Host", 4}, nullptr, nullptr,
                                 nullptr,              one.handler,                  0};
    if (Error* error = api->register_handler(&registration)) {
      ErrorMessage message = {head<ErrorMessage>(), error, nullptr};
      api->get_message(&message);
      snprintf(why_not, size, "%s", message.message);
      OldError old = {head<OldError>(), error};
      api->destroy_error(&old);
      return;
    }
  }
}
