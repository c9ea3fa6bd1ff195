// One timed pass of reading over a buffer, for ceiling.py.
//
// Threads take pieces of the buffer from a shared counter. A thread reads its piece as `streams` runs side by side,
// one cache line of each in turn, and asks for the line `ahead` bytes further on (0: leaves that to the processor).

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

enum { LINE = 64, PIECE = 4 << 20, MOST_THREADS = 1024 };

typedef float lanes __attribute__((vector_size(LINE)));

typedef struct {
  const char *data;
  size_t bytes;
  int streams, ahead;
  atomic_size_t *next;
  float sum;
} job;

static inline lanes read_piece(const char *piece, size_t bytes, const int streams, int ahead) {
  lanes sums[16] = {{0}};
  const size_t run = bytes / streams / LINE * LINE;
  for (size_t at = 0; at < run; at += LINE) {
#pragma GCC unroll 16
    for (int s = 0; s < streams; s++) {
      const char *line = piece + s * run + at;
      if (ahead) __builtin_prefetch(line + ahead);
      sums[s] += *(const lanes *)line;
    }
  }
  for (int s = 1; s < streams; s++) sums[0] += sums[s];
  return sums[0];
}

// The number of streams must be known to the compiler, so that the sums stay in registers.
static lanes read_streams(const char *piece, size_t bytes, int streams, int ahead) {
  switch (streams) {
    case 1: return read_piece(piece, bytes, 1, ahead);
    case 2: return read_piece(piece, bytes, 2, ahead);
    case 4: return read_piece(piece, bytes, 4, ahead);
    case 8: return read_piece(piece, bytes, 8, ahead);
    default: return read_piece(piece, bytes, 16, ahead);
  }
}

static void *work(void *argument) {
  job *j = argument;
  lanes sum = {0};
  for (size_t at; (at = atomic_fetch_add(j->next, PIECE)) < j->bytes;) {
    size_t left = j->bytes - at;
    sum += read_streams(j->data + at, left < PIECE ? left : PIECE, j->streams, j->ahead);
  }
  for (int i = 0; i < LINE / (int)sizeof(float); i++) j->sum += sum[i];
  return NULL;
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Gives the seconds of one pass. `sum` takes the sum of all floats, so that no read can be left out.
double read_pass(const char *data, size_t bytes, int threads, int streams, int ahead, float *sum) {
  pthread_t ids[MOST_THREADS];
  job jobs[MOST_THREADS];
  atomic_size_t next = 0;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  const double start_s = now_s();
  for (int i = 0; i < threads; i++) {
    jobs[i] = (job){data, bytes, streams, ahead, &next, 0};
    if (i && pthread_create(&ids[i], NULL, work, &jobs[i])) threads = i;
  }
  work(&jobs[0]);
  for (int i = 1; i < threads; i++) pthread_join(ids[i], NULL);
  const double end_s = now_s();
  *sum = 0;
  for (int i = 0; i < threads; i++) *sum += jobs[i].sum;
  return end_s - start_s;
}
