// The part of XLA's foreign function interface that the kernels use: declarations of its C binary interface, version 0.2.
//
// TensorFlow's own header is not there when pip builds a package. `register_kernels` refuses another version.
// Source: openxla/xla, xla/ffi/api/c_api.h (Apache License 2.0).
#pragma once

#include <cstddef>
#include <cstdint>

namespace xla_ffi {

constexpr int MAJOR = 0, MINOR = 2;

struct Error;
struct Context;

struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};

// The first fields of each structure that is passed.
struct Head {
  size_t struct_size;
  Extension* extensions;
};

struct Version {
  Head head;
  int major, minor;
};

constexpr int METADATA = 1;

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
  int64_t state_type;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum Type { PRED = 1, S8 = 2, U8 = 6, F32 = 11, BF16 = 16 };

struct Buffer {
  Head head;
  int type;
  void* data;
  int64_t rank;
  int64_t* sizes;
};

// Arguments or results.
struct Buffers {
  Head head;
  int64_t n;
  int* kinds;
  Buffer** buffers;
};

struct Attributes {
  Head head;
  int64_t n;
  int* kinds;
  void** names;
  void** values;
};

struct Api;

struct Call {
  Head head;
  const Api* api;
  Context* context;
  int stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
  void* future;
};

typedef Error* Handler(Call*);

struct Text {
  const char* start;
  size_t length;
};

struct Registration {
  Head head;
  Text name, platform;
  Handler *instantiate, *prepare, *initialize, *execute;
  uint32_t traits;
};

struct NewError {
  Head head;
  const char* message;
  int code;
};
constexpr int INVALID_ARGUMENT = 3;

struct ErrorMessage {
  Head head;
  Error* error;
  const char* message;
};

struct OldError {
  Head head;
  Error* error;
};

struct Task {
  Head head;
  Context* context;
  void (*run)(void*);
  void* data;
};

struct ThreadCount {
  Head head;
  Context* context;
  int64_t* n;
};

struct Api {
  Head head;
  Version version;
  const void* internal;
  Error* (*create_error)(NewError*);
  void (*get_message)(ErrorMessage*);
  void (*destroy_error)(OldError*);
  Error* (*register_handler)(Registration*);
  void* not_used[7];
  Error* (*schedule)(Task*);
  Error* (*count_threads)(ThreadCount*);
};

template <class Struct>
Head head() {
  return {sizeof(Struct), nullptr};
}

}  // namespace xla_ffi
