// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "core/checkpoint/json_object.h"

namespace xgdn {

namespace {

constexpr int64_t kLengthBytes = 8;

struct Descriptor {
  explicit Descriptor(const std::filesystem::path& path, int flags = O_RDONLY | O_NONBLOCK)  // a pipe must not wait
      : number(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }

  const int number;
};

CheckpointError unreadable(const std::filesystem::path& path) {
  return checkpoint_error(path, "", "a readable file", quote(std::generic_category().message(errno)));
}

}  // namespace

// A whole file, readable for as long as the object lives.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) {
    const Descriptor file(path);
    struct stat status {};
    if (file.number < 0 || ::fstat(file.number, &status) != 0) throw unreadable(path);
    if (!S_ISREG(status.st_mode)) throw checkpoint_error(path, "", "a regular file", "something else");
    size_ = status.st_size;
    if (size_ < kLengthBytes) {
      throw checkpoint_error(path, "", "at least 8 bytes, the length of the header", std::to_string(size_));
    }
    void* mapped = ::mmap(nullptr, bytes(), PROT_READ, MAP_PRIVATE, file.number, 0);
    if (mapped == MAP_FAILED) throw unreadable(path);
    begin_ = static_cast<std::byte*>(mapped);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { ::munmap(begin_, bytes()); }

  int64_t size() const { return size_; }
  std::byte* at(int64_t offset) const { return begin_ + offset; }

  void drop_pages(int64_t begin, int64_t end) const {
    const int64_t page = ::sysconf(_SC_PAGESIZE);
    const int64_t first = (begin + page - 1) / page * page;
    const int64_t last = end / page * page;
    if (first < last) ::madvise(at(first), static_cast<size_t>(last - first), MADV_DONTNEED);
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_); }

  std::byte* begin_ = nullptr;
  int64_t size_ = 0;
};

namespace {

using nlohmann::json;
using Entry = SafetensorsFile::Entry;

constexpr size_t kMaxRank = 64;  // of ATen's iterators

// Every dtype of the format. Those that ATen has no element for can be stored, measured and named, not read.
struct DtypeName {
  std::string_view name;
  at::ScalarType dtype;
  int64_t bits;
};

constexpr std::array<DtypeName, 22> kDtypeNames = {{
    {"BF16", at::kBFloat16, 16},
    {"F16", at::kHalf, 16},
    {"F32", at::kFloat, 32},
    {"F64", at::kDouble, 64},
    {"BOOL", at::kBool, 8},
    {"U8", at::kByte, 8},
    {"I8", at::kChar, 8},
    {"U16", at::kUInt16, 16},
    {"I16", at::kShort, 16},
    {"U32", at::kUInt32, 32},
    {"I32", at::kInt, 32},
    {"U64", at::kUInt64, 64},
    {"I64", at::kLong, 64},
    {"F8_E4M3", at::kFloat8_e4m3fn, 8},
    {"F8_E5M2", at::kFloat8_e5m2, 8},
    {"F8_E4M3FNUZ", at::kFloat8_e4m3fnuz, 8},
    {"F8_E5M2FNUZ", at::kFloat8_e5m2fnuz, 8},
    {"F8_E8M0", at::ScalarType::Undefined, 8},
    {"F6_E2M3", at::ScalarType::Undefined, 6},
    {"F6_E3M2", at::ScalarType::Undefined, 6},
    {"F4", at::ScalarType::Undefined, 4},
    {"C64", at::kComplexFloat, 64},
}};

std::string known_dtypes() {
  std::string names = "one of ";
  for (const DtypeName& row : kDtypeNames) names.append(&row == kDtypeNames.data() ? "" : ", ").append(row.name);
  return names;
}

// The length is little-endian, whatever the machine.
int64_t header_length(const MappedFile& file, const std::filesystem::path& path) {
  uint64_t length = 0;
  for (int64_t i = kLengthBytes - 1; i >= 0; --i) length = length << 8 | std::to_integer<uint64_t>(*file.at(i));
  if (length > static_cast<uint64_t>(kMaxJsonBytes)) {
    throw checkpoint_error(path, "header", "at most 100 MB", std::to_string(length) + " bytes");
  }
  const int64_t present = file.size() - kLengthBytes;
  if (static_cast<int64_t>(length) > present) {
    throw checkpoint_error(path, "header", std::to_string(length) + " bytes, as its length says",
                           "a file with " + std::to_string(present) + " bytes after the length");
  }
  return static_cast<int64_t>(length);
}

json parse_header(const MappedFile& file, int64_t length, const std::filesystem::path& path) {
  const std::string_view text(reinterpret_cast<const char*>(file.at(kLengthBytes)), static_cast<size_t>(length));
  if (!text.starts_with('{')) throw checkpoint_error(path, "header", "a JSON object that starts with '{'", quote(text));
  return parse_json(text, path);
}

// Reads one tensor's entry of the header; `name` is quoted for messages.
class EntryReader {
 public:
  EntryReader(const std::filesystem::path& path, std::string name, const json& value)
      : path_(path), name_(std::move(name)), value_(value) {
    if (!value.is_object()) throw error("an object with dtype, shape and data_offsets", describe(value));
  }

  // Offsets in the file count from the end of the header, entries from the file's first byte.
  Entry read(int64_t data_begin, int64_t data_bytes) const {
    Entry entry;
    const DtypeName& dtype = read_dtype();
    entry.dtype = dtype.dtype;
    entry.dtype_name = dtype.name;
    entry.shape = read_shape();
    const auto [begin, end] = read_offsets(data_bytes);
    require_bytes(entry, dtype.bits, end - begin);
    entry.begin = data_begin + begin;
    entry.end = data_begin + end;
    return entry;
  }

 private:
  const DtypeName& read_dtype() const {
    const json& name = field("dtype");
    const auto row = std::ranges::find_if(kDtypeNames, [&](const DtypeName& known) { return name == known.name; });
    if (row == kDtypeNames.end()) throw error("dtype " + known_dtypes(), describe(name));
    return *row;
  }

  std::vector<int64_t> read_shape() const {
    const json& sizes = field("shape");
    if (!sizes.is_array() || sizes.size() > kMaxRank) throw error("shape as an array of sizes", describe(sizes));
    std::vector<int64_t> shape;
    for (const json& size : sizes) {
      const std::optional<int64_t> number = integer_within(size, 0, std::numeric_limits<int64_t>::max());
      if (!number) throw error("shape of non-negative integers", describe(size));
      shape.push_back(*number);
    }
    return shape;
  }

  std::pair<int64_t, int64_t> read_offsets(int64_t data_bytes) const {
    const json& offsets = field("data_offsets");
    if (!offsets.is_array() || offsets.size() != 2) throw error("two data_offsets", describe(offsets));
    const auto begin = integer_within(offsets[0], 0, std::numeric_limits<int64_t>::max());
    const auto end = integer_within(offsets[1], 0, std::numeric_limits<int64_t>::max());
    const std::string got = "[" + describe(offsets[0]) + ", " + describe(offsets[1]) + "]";
    if (!begin || !end || *begin > *end) throw error("data_offsets as two ascending integers", got);
    if (*end > data_bytes) {
      throw error("data_offsets within the file's " + std::to_string(data_bytes) + " bytes of tensors", got);
    }
    return {*begin, *end};
  }

  // Empty dimensions count as one in the overflow check, because strides are products over them too.
  void require_bytes(const Entry& entry, int64_t element_bits, int64_t num_bytes) const {
    const std::string shape = describe_shape(entry.shape);
    int64_t expected = element_bits;
    for (const int64_t size : entry.shape) {
      if (__builtin_mul_overflow(expected, std::max<int64_t>(size, 1), &expected)) {
        throw error("shape whose bytes fit 64 bits", shape);
      }
    }
    if (expected % 8 != 0) throw error("shape that fills whole bytes", shape);
    expected /= 8;
    if (std::ranges::count(entry.shape, 0) > 0) expected = 0;
    if (num_bytes == expected) return;
    throw error(std::to_string(expected) + " bytes, dtype size times shape " + shape,
                "data_offsets that span " + std::to_string(num_bytes));
  }

  const json& field(const char* key) const {
    const auto it = value_.find(key);
    if (it == value_.end()) throw error(std::string("key ") + key, "an entry without it");
    return *it;
  }

  CheckpointError error(std::string_view expected, std::string_view got) const {
    return checkpoint_error(path_, "tensor " + name_, expected, got);
  }

  const std::filesystem::path& path_;
  std::string name_;
  const json& value_;
};

// The format wants every byte behind the header to belong to exactly one tensor.
void require_cover(const std::map<std::string, Entry>& entries, int64_t data_begin, int64_t file_size,
                   const std::filesystem::path& path) {
  std::vector<std::pair<const Entry*, const std::string*>> order;
  for (const auto& [name, entry] : entries) order.emplace_back(&entry, &name);
  std::ranges::sort(order, {}, [](const auto& item) { return std::pair(item.first->begin, item.first->end); });
  int64_t covered = data_begin;
  for (const auto& [entry, name] : order) {
    if (entry->begin != covered) {
      const bool overlaps = entry->begin < covered;
      throw checkpoint_error(path, "tensor " + quote(*name),
                             "to begin at offset " + std::to_string(covered - data_begin) + ", where the last ends",
                             std::to_string(entry->begin - data_begin) + (overlaps ? ", an overlap" : ", a hole"));
    }
    covered = entry->end;
  }
  if (covered != file_size) {
    throw checkpoint_error(path, "", "tensors up to the end of the file",
                           std::to_string(file_size - covered) + " bytes that belong to no tensor, a hole");
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : path_(path), mapping_(std::make_shared<const MappedFile>(path)) {
  const int64_t length = header_length(*mapping_, path_);
  const json header = parse_header(*mapping_, length, path_);
  const int64_t data_begin = kLengthBytes + length;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      for (const auto& [key, text] : value.items()) {
        if (text.is_string()) metadata_.emplace(key, text.get<std::string>());
      }
      continue;
    }
    entries_.emplace(name, EntryReader(path_, quote(name), value).read(data_begin, mapping_->size() - data_begin));
  }
  require_cover(entries_, data_begin, mapping_->size(), path_);
}

const SafetensorsFile::Entry& SafetensorsFile::entry(const std::string& name) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) throw checkpoint_error(path_, "tensor " + quote(name), "a tensor of that name", "none");
  return it->second;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& found = entry(name);
  if (found.dtype == at::ScalarType::Undefined) {
    throw checkpoint_error(path_, "tensor " + quote(name), "a dtype with elements to read", found.dtype_name);
  }
  const auto options = at::TensorOptions(found.dtype);
  std::byte* first = mapping_->at(found.begin);
  const bool aligned = reinterpret_cast<uintptr_t>(first) % c10::elementSize(found.dtype) == 0;
  if (aligned && found.num_bytes() > 0) {
    return at::from_blob(
        first, found.shape, [keep = mapping_](void*) {}, options);
  }
  at::Tensor copy = at::empty(found.shape, options);
  if (found.num_bytes() > 0) std::memcpy(copy.data_ptr(), first, static_cast<size_t>(found.num_bytes()));
  return copy;
}

std::string_view SafetensorsFile::bytes(const std::string& name) const {
  const Entry& found = entry(name);
  return {reinterpret_cast<const char*>(mapping_->at(found.begin)), static_cast<size_t>(found.num_bytes())};
}

void SafetensorsFile::release(const std::string& name) const {
  const Entry& found = entry(name);
  mapping_->drop_pages(found.begin, found.end);
}

namespace {

std::string header_of(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  json header = json::object();
  header["__metadata__"] = metadata;
  int64_t begin = 0;
  for (const auto& [name, tensor] : tensors) {
    const auto row = std::ranges::find(kDtypeNames, tensor.scalar_type(), &DtypeName::dtype);
    if (row == kDtypeNames.end()) {
      throw checkpoint_error(path, "tensor " + quote(name), known_dtypes(), c10::toString(tensor.scalar_type()));
    }
    const auto end = begin + static_cast<int64_t>(tensor.nbytes());
    header[name] = {{"dtype", row->name}, {"shape", tensor.sizes().vec()}, {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that tensors are aligned
  return text;
}

class Writer {
 public:
  explicit Writer(const std::filesystem::path& path) : path_(path), file_(path, O_WRONLY | O_CREAT | O_TRUNC) {
    if (file_.number < 0) throw unwritable();
  }

  void write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::write(file_.number, bytes.data(), bytes.size());
      if (count < 0 && errno != EINTR) throw unwritable();
      if (count > 0) bytes.remove_prefix(static_cast<size_t>(count));
    }
  }

  void sync() {
    if (::fsync(file_.number) != 0) throw unwritable();
  }

 private:
  CheckpointError unwritable() const {
    return checkpoint_error(path_, "", "a file that can be written", quote(std::generic_category().message(errno)));
  }

  std::filesystem::path path_;
  Descriptor file_;
};

}  // namespace

void write_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const std::string header = header_of(path, tensors, metadata);
  std::string length;
  for (int64_t i = 0; i < kLengthBytes; ++i) length.push_back(static_cast<char>(header.size() >> (8 * i) & 0xFF));
  std::filesystem::path beside = path;
  beside += ".partial-" + std::to_string(::getpid());
  try {
    Writer writer(beside);
    writer.write(length);
    writer.write(header);
    for (const auto& [name, tensor] : tensors) {
      const at::Tensor rows = tensor.contiguous();
      writer.write({static_cast<const char*>(rows.const_data_ptr()), rows.nbytes()});
    }
    writer.sync();
    std::filesystem::rename(beside, path);
  } catch (const std::filesystem::filesystem_error& error) {
    std::error_code ignored;
    std::filesystem::remove(beside, ignored);
    throw checkpoint_error(path, "", "a file that can be written", quote(error.code().message()));
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove(beside, ignored);
    throw;
  }
}

}  // namespace xgdn
