// Batches of KV events in msgpack, as vLLM and SGLang write them, split into runs in flat arrays.
//
// The bytes come from outside, and the decoder in Python says what they mean. Here only what is plain is taken:
// stores and removals whose fields are integers, nil and ASCII. Of anything else the place is noted, for the
// decoder in Python to read, and a batch that is not framed as expected is left to it altogether. So this code
// never refuses a message, and what it does not know is never guessed.
//
// Time is linear in the bytes, whatever lengths they claim; no recursion.
#pragma once

#include <array>
#include <memory>
#include <string_view>
#include <vector>

#include "kv_event.hpp"
#include "msgpack_integers.hpp"

namespace mulsched {

// Neighbours that share what is said here; or one event that is not plain, in data[begin, end).
struct KvPart {
  static constexpr std::uint64_t kNoId = std::numeric_limits<std::uint64_t>::max();

  bool plain;
  std::size_t begin, end;
  std::size_t first_event, first_hash, first_token;  // where its arrays begin in those of the batch
  std::size_t n_events = 0, n_hashes = 0, n_tokens = 0;
  std::string_view medium = {}, lora_name = {};  // empty for nil; "GPU" is nil too
  std::uint64_t block_size = 0;                  // 0 until there is a store
  std::uint64_t lora_id = kNoId;                 // kNoId for nil
};

class KvBatch {
 public:
  static constexpr std::uint64_t kNoId = KvPart::kNoId;

  double timestamp = 0;
  std::uint64_t rank = kNoId;
  std::size_t ignored = 0;  // of another cache group, or without tokens
  std::vector<KvPart> parts;
  std::vector<KvEvent> events;

  // Of all runs, one after the other.
  const std::uint64_t* hashes() const noexcept { return hashes_.get(); }
  const std::uint32_t* tokens() const noexcept { return tokens_.get(); }
  std::size_t n_hashes() const noexcept { return n_hashes_; }

  // Whether all parts are runs, and those that do not lie on the GPU have no more than `most` events together.
  bool plain_within(std::size_t most) const noexcept {
    std::size_t elsewhere = 0;
    for (const KvPart& part : parts) {
      if (!part.plain) return false;
      if (!part.medium.empty()) elsewhere += part.n_events;
    }
    return parts.size() + elsewhere <= most;
  }

  // False if this is no batch, or not one that is framed in the usual way, or if it has more than max_parts
  // parts: it is given up then, so that what is done for a part is bounded whatever a message alternates.
  bool split(const std::uint8_t* data, std::size_t size, std::uint64_t group_idx, std::size_t max_parts) {
    data_ = data;
    size_ = size;
    group_idx_ = group_idx;
    max_parts_ = max_parts;
    if (size < 10 || (data[0] != 0x92 && data[0] != 0x93) || data[1] != 0xcb) return false;
    std::uint64_t bits;
    std::memcpy(&bits, data + 2, sizeof bits);
    bits = __builtin_bswap64(bits);
    std::memcpy(&timestamp, &bits, sizeof bits);
    std::size_t count = 0, at = 10;
    if (!open_array(at, count)) return false;
    hashes_.reset(new std::uint64_t[size]);
    tokens_.reset(new std::uint32_t[size]);
    for (std::size_t i = 0; i < count; ++i) {
      at = split_event(at);
      if (at == kNowhere) return false;
    }
    if (data[0] == 0x93) {
      if (at == size) return false;
      if (data[at] == kNil) {
        ++at;
      } else if (!read_id(at, rank)) {
        return false;
      }
    }
    return at == size;
  }

 private:
  static constexpr std::size_t kNowhere = kNoIntegers, kMaxDepth = 32;
  static constexpr std::uint8_t kNil = 0xc0;

  enum Field { kHashes, kParent, kTokens, kBlockSize, kLoraId, kMedium, kLoraName, kExtraKeys, kGroup, kSalt, kOther };
  struct Name {
    std::string_view text;
    Field field;
  };
  // In the order of the arrays and, so far, of the maps. The salt is a field of maps only.
  static constexpr std::array<Name, 10> kStored{{{"block_hashes", kHashes},
                                                 {"parent_block_hash", kParent},
                                                 {"token_ids", kTokens},
                                                 {"block_size", kBlockSize},
                                                 {"lora_id", kLoraId},
                                                 {"medium", kMedium},
                                                 {"lora_name", kLoraName},
                                                 {"extra_keys", kExtraKeys},
                                                 {"group_idx", kGroup},
                                                 {"cache_salt", kSalt}}};
  static constexpr std::array<Name, 3> kRemoved{
      {{"block_hashes", kHashes}, {"medium", kMedium}, {"group_idx", kGroup}}};

  // The event that is being read.
  struct Read {
    unsigned seen = 0;  // a bit a field
    std::size_t n_hashes = 0, n_tokens = 0, n_extra_keys = 0;
    bool has_parent = false, has_extra_keys = false;
    std::uint64_t parent = 0, block_size = 0, lora_id = kNoId, group = kNoId;
    std::string_view medium, lora_name;
  };

  // Enters the event that begins here; returns where it ends.
  std::size_t split_event(std::size_t begin) {
    Read read;
    bool removal = false;
    std::size_t at = begin;
    if (read_plain(at, read, removal)) {
      if ((read.group != kNoId && read.group != group_idx_) || (!removal && read.n_tokens == 0)) {
        ++ignored;
        return at;
      }
      return enter(read, removal, begin, at) ? at : kNowhere;
    }
    const std::size_t end = skip(begin);
    return end != kNowhere && begin_part(false, begin, end) ? end : kNowhere;
  }

  // False if there would be too many.
  bool begin_part(bool plain, std::size_t begin, std::size_t end) {
    if (parts.size() == max_parts_) return false;
    parts.push_back({plain, begin, end, events.size(), n_hashes_, n_tokens_});
    return true;
  }

  bool enter(const Read& read, bool removal, std::size_t begin, std::size_t end) {
    if (parts.empty() || !joins(parts.back(), read, removal)) {
      if (!begin_part(true, begin, end)) return false;
      parts.back().medium = read.medium;
    }
    KvPart& run = parts.back();
    if (!removal) {
      run.block_size = read.block_size;
      run.lora_name = read.lora_name;
      run.lora_id = read.lora_id;
    }
    const KvKind kind = removal ? KvKind::kRemoved : read.has_parent ? KvKind::kAfterParent : KvKind::kStart;
    if (removal && run.n_events > 0 && events.back().kind == kind) {
      events.back().n_blocks += read.n_hashes;
    } else {
      events.push_back({kind, read.n_hashes, read.parent});
      ++run.n_events;
    }
    run.end = end;
    run.n_hashes += read.n_hashes;
    run.n_tokens += read.n_tokens;
    n_hashes_ += read.n_hashes;
    n_tokens_ += read.n_tokens;
    return true;
  }

  static bool joins(const KvPart& run, const Read& read, bool removal) {
    return run.plain && run.medium == read.medium &&
           (removal || run.block_size == 0 ||
            (run.block_size == read.block_size && run.lora_name == read.lora_name && run.lora_id == read.lora_id));
  }

  bool read_plain(std::size_t& at, Read& read, bool& removal) {
    std::size_t n_fields = 0;
    bool is_map = false;
    std::string_view text;
    if (!open_event(at, is_map, n_fields) || n_fields-- == 0 || (is_map && !(read_text(at, text) && text == "type")) || !read_text(at, text)) return false;
    removal = text == "BlockRemoved";
    if (!removal && text != "BlockStored") return false;
    const Name* const names = removal ? kRemoved.data() : kStored.data();
    const std::size_t n_names = removal ? kRemoved.size() : kStored.size() - (is_map ? 0 : 1);
    for (std::size_t i = 0; i < n_fields; ++i) {
      Field field = i < n_names ? names[i].field : kOther;
      if (is_map) {
        if (!read_text(at, text) || text == "type") return false;
        if (i >= n_names || text != names[i].text) field = find(names, n_names, text);
      }
      if (field != kOther && (read.seen >> field & 1) != 0) return false;
      read.seen |= 1U << field;
      if (!read_field(at, field, read)) return false;
    }
    if (removal) return (read.seen & 1U << kHashes) != 0;
    constexpr unsigned kNeeded = 1U << kHashes | 1U << kParent | 1U << kTokens | 1U << kBlockSize;
    return (read.seen & kNeeded) == kNeeded && read.n_tokens == read.n_hashes * read.block_size &&
           (!read.has_extra_keys || read.n_extra_keys == read.n_hashes);
  }

  static Field find(const Name* names, std::size_t n_names, std::string_view text) {
    for (std::size_t i = 0; i < n_names; ++i)
      if (names[i].text == text) return names[i].field;
    return kOther;
  }

  bool read_field(std::size_t& at, Field field, Read& read) {
    if (at >= size_) return false;
    if (field == kOther) return (at = skip(at)) != kNowhere;
    if (field == kHashes) return read_array(at, hashes_.get() + n_hashes_, read.n_hashes);
    if (field == kTokens) return read_array(at, tokens_.get() + n_tokens_, read.n_tokens);
    if (data_[at] == kNil) {
      ++at;
      return field != kBlockSize;
    }
    switch (field) {
      case kParent:
        read.has_parent = true;
        return (at = read_integers(data_, size_, at, 1, &read.parent)) != kNowhere;
      case kBlockSize:
        return read_id(at, read.block_size) && read.block_size > 0;
      case kLoraId:
        return read_id(at, read.lora_id);
      case kGroup:
        return read_id(at, read.group);
      case kLoraName:
        return read_ascii(at, read.lora_name) && !read.lora_name.empty();
      case kMedium:
        if (!read_ascii(at, read.medium) || read.medium.empty()) return false;
        if (read.medium == "GPU") read.medium = {};
        return true;
      case kExtraKeys: {
        read.has_extra_keys = true;
        if (!open_array(at, read.n_extra_keys)) return false;
        for (const std::size_t end = at + read.n_extra_keys; at < end; ++at)
          if (data_[at] != kNil) return false;
        return true;
      }
      default:
        return false;  // a salt
    }
  }

  bool open_event(std::size_t& at, bool& is_map, std::size_t& n_fields) const {
    if (at == size_) return false;
    const std::uint8_t tag = data_[at];
    is_map = (tag & 0xf0) == 0x80 || tag == 0xde;
    if (!is_map) return open_array(at, n_fields);
    ++at;
    n_fields = tag & 0x0f;
    if (tag != 0xde) return true;
    if (size_ - at < 2) return false;
    n_fields = std::size_t{data_[at]} << 8 | data_[at + 1];
    at += 2;
    return true;
  }

  bool open_array(std::size_t& at, std::size_t& count) const {
    std::size_t header = 0;
    if (!read_array_header(data_ + at, size_ - at, count, header)) return false;
    at += header;
    return true;
  }

  template <typename Word>
  bool read_array(std::size_t& at, Word* out, std::size_t& count) const {
    return open_array(at, count) && (at = read_integers(data_, size_, at, count, out)) != kNowhere;
  }

  // A number that is small, as ids are; so that it is the same as Python's.
  bool read_id(std::size_t& at, std::uint64_t& id) const {
    return (at = read_integers(data_, size_, at, 1, &id)) != kNowhere && id < std::uint64_t{1} << 31;
  }

  bool read_text(std::size_t& at, std::string_view& text) const {
    if (at >= size_) return false;
    std::size_t length = data_[at++];
    if ((length & 0xe0) == 0xa0) {
      length &= 0x1f;
    } else if (length == 0xd9 && at < size_) {
      length = data_[at++];
    } else {
      return false;
    }
    if (size_ - at < length) return false;
    text = {reinterpret_cast<const char*>(data_) + at, length};
    at += length;
    return true;
  }

  bool read_ascii(std::size_t& at, std::string_view& text) const {
    if (!read_text(at, text)) return false;
    for (const char c : text)
      if ((c & 0x80) != 0) return false;
    return true;
  }

  // Where the value that begins here ends; kNowhere if it is cut short, none, or nested deeper than kMaxDepth.
  std::size_t skip(std::size_t at) const {
    std::array<std::uint64_t, kMaxDepth> left;  // items to come, of each array and map around
    std::size_t depth = 0;
    left[0] = 1;
    while (true) {
      while (left[depth] == 0) {
        if (depth == 0) return at;
        --depth;
      }
      --left[depth];
      if (at >= size_) return kNowhere;
      const std::uint8_t tag = data_[at++];
      std::uint64_t items = 0, bytes = 0;
      std::size_t width = 0;  // of a length that follows
      if (tag < 0x80 || tag >= 0xe0 || tag == kNil || tag == 0xc2 || tag == 0xc3) continue;
      if (tag < 0xa0) {
        items = tag < 0x90 ? 2 * (tag & 0x0fU) : tag & 0x0fU;
      } else if (tag < 0xc0) {
        bytes = tag & 0x1f;
      } else if (tag >= 0xc4 && tag <= 0xc9) {  // binary, extension
        width = std::size_t{1} << ((tag - 0xc4) % 3);
        bytes = tag >= 0xc7 ? 1 : 0;
      } else if (tag == 0xca || tag == 0xcb) {
        bytes = tag == 0xca ? 4 : 8;
      } else if (tag >= 0xcc && tag <= 0xd3) {
        bytes = std::uint64_t{1} << (tag & 3);
      } else if (tag >= 0xd4 && tag <= 0xd8) {  // extension
        bytes = 1 + (std::uint64_t{1} << (tag - 0xd4));
      } else if (tag >= 0xd9 && tag <= 0xdb) {
        width = std::size_t{1} << (tag - 0xd9);
      } else if (tag >= 0xdc) {
        width = (tag & 1) == 0 ? 2 : 4;
      } else {
        return kNowhere;
      }
      if (size_ - at < width) return kNowhere;
      std::uint64_t length = 0;
      for (std::size_t i = 0; i < width; ++i) length = length << 8 | data_[at++];
      if (tag >= 0xdc) {
        items = tag >= 0xde ? 2 * length : length;
      } else {
        bytes += length;
      }
      if (size_ - at < bytes) return kNowhere;
      at += bytes;
      if (items == 0) continue;
      if (++depth == kMaxDepth) return kNowhere;
      left[depth] = items;
    }
  }

  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::uint64_t group_idx_ = 0;
  std::size_t max_parts_ = 0;
  // As long as the message, since an integer takes a byte; no page is touched before something is written.
  std::unique_ptr<std::uint64_t[]> hashes_;
  std::unique_ptr<std::uint32_t[]> tokens_;
  std::size_t n_hashes_ = 0, n_tokens_ = 0;
};

}  // namespace mulsched
