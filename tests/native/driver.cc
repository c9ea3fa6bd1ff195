// Runs the kernels of every instruction set that the processor has over odd shapes, in memory without a byte to spare,
// alone and on several threads; for compilers' sanitizers: see `make test-native-sanitized`.

#include "../../tf_gpt2/runtime/native/kernels.cc"

#include <algorithm>
#include <vector>

namespace {

// A pool like XLA's, which starts a thread for each task; every third one is refused.
std::atomic<int> n_tasks{0}, n_running{0};

xla_ffi::Error* schedule(xla_ffi::Task* task) {
  if (n_tasks.fetch_add(1) % 3 == 2) return (xla_ffi::Error*)1;
  n_running.fetch_add(1);
  std::thread([run = task->run, data = task->data] {
    run(data);
    n_running.fetch_sub(1);
  }).detach();
  return nullptr;
}

void destroy_error(xla_ffi::OldError*) {}

template <class T>
std::vector<T> random_numbers(size_t n, int low, int high) {
  std::vector<T> numbers(n);
  for (T& number : numbers) number = (T)(low + rand() % (high - low + 1));
  return numbers;
}

std::vector<float> compute(const Kernels& kernels, const Pool& pool, bool is_4_bit, int n_rows, int n_in, int n_out) {
  srand(n_rows + 1000 * n_in);
  const int n_groups = divide_up(n_in, BLOCK_4);
  auto x = random_numbers<float>((size_t)n_rows * n_in, -1000, 1000);
  auto weights = random_numbers<int8_t>((size_t)n_out * (is_4_bit ? 16 * n_groups : n_in), -127, 127);
  auto output_scales = random_numbers<float>(n_out, 1, 9);
  auto group_scales = random_numbers<uint16_t>((size_t)n_groups * n_out, 0x3f00, 0x3fff);
  const void* scales = is_4_bit ? (void*)group_scales.data() : (void*)output_scales.data();
  std::vector<float> y((size_t)n_rows * n_out);
  run(make_product(x.data(), weights.data(), scales, y.data(), n_rows, n_in, n_out, is_4_bit), is_4_bit, kernels, pool);
  return y;
}

// Returns how many results differ from the row computed alone, or from a sum in double precision by more than rounding.
int n_wrong_floats(const Kernels& kernels, const Pool& pool, int n_rows, int n_in, int n_out) {
  auto x = random_numbers<float>((size_t)n_rows * n_in, -1000, 1000);
  auto weights = random_numbers<float>((size_t)n_out * n_in, -1000, 1000);
  std::vector<float> y((size_t)n_rows * n_out), alone(n_out);
  run_floats({x.data(), weights.data(), y.data(), n_rows, n_in, n_out}, kernels, pool);
  int n_wrong = 0;
  for (int row = 0; row < n_rows; ++row) {
    const float* x_row = x.data() + (size_t)row * n_in;
    run_floats({x_row, weights.data(), alone.data(), 1, n_in, n_out}, kernels, Pool());
    for (int output = 0; output < n_out; ++output) {
      double exact = 0;
      for (int i = 0; i < n_in; ++i) exact += (double)x_row[i] * weights[(size_t)output * n_in + i];
      const float found = y[(size_t)row * n_out + output];
      n_wrong += found != alone[output] || std::abs(found - exact) > 1e-6 * 1e6 * n_in;
    }
  }
  return n_wrong;
}

// Returns how many results of attention differ from those of one head at a time, alone, or from sums in double precision.
int n_wrong_attention(const Kernels& kernels, const Pool& pool, int n_heads, int n_queries, int n_keys, int width) {
  auto q = random_numbers<float>((size_t)n_heads * n_queries * width, -3, 3);
  auto k = random_numbers<float>((size_t)n_heads * n_keys * width, -3, 3);
  auto v = random_numbers<float>((size_t)n_heads * n_keys * width, -9, 9);
  auto mask = random_numbers<uint8_t>((size_t)n_queries * n_keys, 0, 1);
  for (int query = 0; query < n_queries; ++query) mask[(size_t)query * n_keys] = 1;
  std::vector<float> weights((size_t)n_heads * n_queries * n_keys), y(q.size()), weights_alone(weights), alone(y);
  run_weights({q.data(), k.data(), mask.data(), weights.data(), n_heads, 1, n_queries, n_keys, width}, kernels, pool);
  run_sum({weights.data(), v.data(), y.data(), n_heads, n_queries, n_keys, width}, kernels, pool);
  int n_wrong = 0;
  for (int head = 0; head < n_heads; ++head)
    for (int query = 0; query < n_queries; ++query) {
      const size_t row = (size_t)head * n_queries + query;
      const float* keys = k.data() + (size_t)head * n_keys * width;
      const float* values = v.data() + (size_t)head * n_keys * width;
      run_weights({q.data() + row * width, keys, mask.data() + (size_t)query * n_keys, weights_alone.data(), 1, 1, 1,
                   n_keys, width},
                  kernels, Pool());
      run_sum({weights_alone.data(), values, alone.data(), 1, 1, n_keys, width}, kernels, Pool());
      double sum = 0;
      for (int key = 0; key < n_keys; ++key) sum += weights[row * n_keys + key];
      n_wrong += std::abs(sum - 1) > 1e-5;
      for (int i = 0; i < width; ++i) {
        double exact = 0;
        for (int key = 0; key < n_keys; ++key)
          exact += (double)weights[row * n_keys + key] * values[(size_t)key * width + i];
        const float found = y[row * width + i];
        n_wrong += found != alone[i] || std::abs(found - exact) > 1e-4;
      }
    }
  return n_wrong;
}

}  // namespace

int main() {
  xla_ffi::Api api = {};
  api.schedule = schedule;
  api.destroy_error = destroy_error;
  Pool pool;
  pool.api = &api;
  pool.n_threads = 4;
  int n_wrong = 0, n_cases = 0;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set) {
    if (!set->is_here) continue;
    for (int n_in : {1, 12, 31, 64, 65, 200})
      for (int n_out : {1, 7, 16, 33, 150})
        for (int n_rows : {1, 2, 3, 5, 8, 11, 130})
          for (bool is_4_bit : {false, true}) {
            auto wanted = compute(portable::kernels, Pool(), is_4_bit, n_rows, n_in, n_out);
            n_wrong += compute(*set->kernels, Pool(), is_4_bit, n_rows, n_in, n_out) != wanted;
            n_wrong += compute(*set->kernels, pool, is_4_bit, n_rows, n_in, n_out) != wanted;
            ++n_cases;
          }
    for (int n_in : {1, 7, 16, 31, 200})
      for (int n_out : {1, 2, 3, 7, 50})
        for (int n_rows : {1, 2, 3, 5, 8, 11}) {
          n_wrong += n_wrong_floats(*set->kernels, Pool(), n_rows, n_in, n_out) != 0;
          n_wrong += n_wrong_floats(*set->kernels, pool, n_rows, n_in, n_out) != 0;
          ++n_cases;
        }
    for (int width : {1, 5, 16, 64, 70})
      for (int n_keys : {1, 3, 16, 37})
        for (int n_queries : {1, 3}) {
          n_wrong += n_wrong_attention(*set->kernels, Pool(), 3, n_queries, n_keys, width) != 0;
          n_wrong += n_wrong_attention(*set->kernels, pool, 3, n_queries, n_keys, width) != 0;
          ++n_cases;
        }
    printf("%s: %d cases, %d wrong\n", set->name, n_cases, n_wrong);
  }
  // many requests at a time
  std::vector<std::thread> requests;
  std::atomic<int> n_differ{0};
  for (int i = 0; i < 8; ++i)
    requests.emplace_back([&, i] {
      const Kernels& kernels = *find_kernels(nullptr);
      for (int turn = 0; turn < 20; ++turn) {
        std::vector<float> x(64 * (i + 1), 1.0f), scales(90, 1.0f), y(90 * (i + 1));
        std::vector<int8_t> weights(64 * 90, 1);
        run(make_product(x.data(), weights.data(), scales.data(), y.data(), i + 1, 64, 90, false), false, kernels, pool);
        n_differ += std::any_of(y.begin(), y.end(), [](float value) { return std::abs(value - 64) > 1e-4f; });
      }
    });
  for (auto& request : requests) request.join();
  while (n_running.load()) std::this_thread::yield();
  printf("many requests: %d wrong\n", n_differ.load());
  return n_wrong + n_differ.load() != 0;
}
