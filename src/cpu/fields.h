// Tables of the fields of every kernel: name, kind and offset. With them the extension module fills the argument
// struct of any kernel from Python keyword arguments, without code per kernel.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace kp {

enum class Kind : int { array, optional_array, int32, int64, uint64, float64, boolean, optional_int };

struct Field {
  const char* name;
  Kind kind;
  int64_t offset;
};

struct KernelRow {
  const char* name;
  const Field* fields;
  int num_fields;
  int64_t threads;  // offset of the number of threads
};

template <class T>
constexpr Kind kind_of() {
  static_assert(
      std::is_class_v<T> || std::is_same_v<T, bool> || sizeof(T) == 8 || std::is_same_v<T, int> || std::is_enum_v<T>,
      "a field of this type has no kind");
  if (std::is_same_v<T, OptionalArray>) return Kind::optional_array;
  if (std::is_same_v<T, Array>) return Kind::array;
  if (std::is_same_v<T, OptionalInt>) return Kind::optional_int;
  if (std::is_same_v<T, bool>) return Kind::boolean;
  if (std::is_same_v<T, double>) return Kind::float64;
  if (std::is_same_v<T, int64_t>) return Kind::int64;
  if (std::is_same_v<T, uint64_t>) return Kind::uint64;
  return Kind::int32;
}

#define KP_ENTRY(type, name) {#name, kind_of<type>(), int64_t(offsetof(Fields, name))},
#define KP_TABLE(struct_name)                                                      \
  inline const Field* fields_of(const struct_name*) {                              \
    using Fields = struct_name;                                                    \
    static_assert(sizeof(Fields) <= 1024, "run() in cpu.pyx reserves 1024 bytes"); \
    static const Field fields[] = {KP_FIELDS_##struct_name(KP_ENTRY)};             \
    return fields;                                                                 \
  }
KP_STRUCTS(KP_TABLE)
#undef KP_TABLE
#undef KP_ENTRY

#define KP_COUNT(type, name) +1
#define KP_ROW(name, fields)                                                              \
  {#name, fields_of(static_cast<const fields*>(nullptr)), 0 KP_FIELDS_##fields(KP_COUNT), \
   int64_t(offsetof(fields, threads))},
inline const KernelRow kernel_rows[] = {KP_KERNELS(KP_ROW)};
#undef KP_ROW
#undef KP_COUNT

constexpr int num_kernels = int(sizeof(kernel_rows) / sizeof(kernel_rows[0]));

}  // namespace kp
