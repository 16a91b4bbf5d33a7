// SPDX-License-Identifier: Apache-2.0
#include "files/pickle.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <optional>
#include <utility>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"

namespace xattn::detail {
namespace {

using Id = Pickle::Id;
using Kind = Pickle::Kind;
using Node = Pickle::Node;

constexpr std::string_view kPickle = "pickle";
constexpr Id kNowhere = ~Id{0};

// The result of a call to a global.
enum class Use : uint8_t {
  name,           // a record without contents
  dict,           // a new dict
  tensor,         // a tensor, from its arguments
  other_tensor,   // a tensor of a kind that is not read
  parameter,      // the first argument, a tensor
  first,          // the first argument: a list with its type
  with_state,     // a tensor with attributes: the function, its class, the function's arguments, the attributes
  other,          // a value that no reader needs
  script_object,  // an object, if made by NEWOBJ
};

struct Globals {
  std::string_view module;
  Use use;
  std::array<std::string_view, 5> names;
};

// The globals of torch._weights_only_unpickler and of TorchScript.
constexpr std::array kGlobals{
    Globals{"collections", Use::dict, {"OrderedDict", "defaultdict"}},
    Globals{"torch._utils", Use::tensor, {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}},
    Globals{"torch._utils", Use::parameter, {"_rebuild_parameter", "_rebuild_parameter_with_state"}},
    Globals{"torch._tensor", Use::with_state, {"_rebuild_from_type_v2"}},
    Globals{"torch.nn.parameter", Use::parameter, {"Parameter"}},
    Globals{"torch.autograd.variable", Use::parameter, {"Variable"}},
    Globals{"torch.storage", Use::name, {"UntypedStorage"}},
    Globals{"torch.serialization", Use::other, {"_get_layout"}},
    Globals{"torch", Use::other, {"Size", "device"}},
    Globals{"collections", Use::other, {"Counter"}},
    Globals{"_codecs", Use::other, {"encode"}},
    Globals{"builtins", Use::other, {"bytearray", "complex", "set"}},
    Globals{"torch.jit._pickle",
            Use::first,
            {"build_boollist", "build_doublelist", "build_intlist", "build_tensorlist", "restore_type_tag"}},
};

class Machine {
 public:
  Machine(const std::string& path, Bytes bytes, PickleNames names) : check_(kPickle, path), bytes_(bytes), names_(names) {}

  Pickle run() {
    check_(bytes_.size() <= kMaxPickle, "has {} bytes, over the limit of {}", bytes_.size(), kMaxPickle);
    pickle_.nodes.resize(kShared);
    pickle_.nodes[kFalseNode].kind = pickle_.nodes[kTrueNode].kind = Kind::boolean;
    pickle_.nodes[kTrueNode].integer = 1;
    pickle_.nodes[kOtherNode].kind = Kind::other;
    pickle_.nodes[kEmptyTupleNode].kind = Kind::tuple;
    while (step()) {
    }
    pickle_.root = pop();
    pickle_.bytes = position_;
    return std::move(pickle_);
  }

 private:
  // Values without identity share one node each.
  enum : Id { kNoneNode, kFalseNode, kTrueNode, kOtherNode, kEmptyTupleNode, kShared };

  // Executes one instruction. Returns false if it is the last. Instructions have their names in Python's pickletools.
  bool step() {
    begin_ = position_;
    const auto opcode = number<uint8_t>();
    switch (opcode) {
      case 0x80: number<uint8_t>(); break;   // PROTO
      case 0x95: number<uint64_t>(); break;  // FRAME
      case '.': return false;                // STOP

      case '(': marks_.push_back(stack_.size()); break;  // MARK
      case '0': pop_or_unmark(); break;                  // POP
      case '1': drop(since_mark()); break;               // POP_MARK
      case '2': push(top()); break;                      // DUP

      case 'q': memoize(number<uint8_t>()); break;   // BINPUT
      case 'r': memoize(number<uint32_t>()); break;  // LONG_BINPUT
      case 0x94: memoize(memo_.size()); break;       // MEMOIZE
      case 'h': recall(number<uint8_t>()); break;    // BINGET
      case 'j': recall(number<uint32_t>()); break;   // LONG_BINGET
      case 'p': memoize(index_of_line()); break;     // PUT
      case 'g': recall(index_of_line()); break;      // GET

      case 'N': push(kNoneNode); break;                        // NONE
      case 0x88: push(kTrueNode); break;                       // NEWTRUE
      case 0x89: push(kFalseNode); break;                      // NEWFALSE
      case 'J': push_integer(number<int32_t>()); break;        // BININT
      case 'K': push_integer(number<uint8_t>()); break;        // BININT1
      case 'M': push_integer(number<uint16_t>()); break;       // BININT2
      case 0x8a: push_long(take(number<uint8_t>())); break;    // LONG1
      case 0x8b: push_long(take(number<uint32_t>())); break;   // LONG4
      case 'I':                                                // INT
      case 'L': push_decimal(line()); break;                   // LONG
      case 'G': push_real(number<uint64_t>()); break;          // BINFLOAT
      case 'F': push_float(line()); break;                     // FLOAT
      case 'U':                                                // SHORT_BINSTRING
      case 0x8c: push_text(take(number<uint8_t>())); break;    // SHORT_BINUNICODE
      case 'T':                                                // BINSTRING
      case 'X': push_text(take(number<uint32_t>())); break;    // BINUNICODE
      case 0x8d: push_text(take(number<uint64_t>())); break;   // BINUNICODE8
      case 'S': push_quoted(line()); break;                    // STRING
      case 'V': push_escaped(line()); break;                   // UNICODE
      case 'C': push_other(take(number<uint8_t>())); break;    // SHORT_BINBYTES
      case 'B': push_other(take(number<uint32_t>())); break;   // BINBYTES
      case 0x8e:                                               // BINBYTES8
      case 0x96: push_other(take(number<uint64_t>())); break;  // BYTEARRAY8

      case ')': push(kEmptyTupleNode); break;                  // EMPTY_TUPLE
      case 0x85: collect(Kind::tuple, 1); break;               // TUPLE1
      case 0x86: collect(Kind::tuple, 2); break;               // TUPLE2
      case 0x87: collect(Kind::tuple, 3); break;               // TUPLE3
      case 't': collect(Kind::tuple, since_mark()); break;     // TUPLE
      case ']': collect(Kind::list, 0); break;                 // EMPTY_LIST
      case 'l': collect(Kind::list, since_mark()); break;      // LIST
      case 'a': append(Kind::list, 1); break;                  // APPEND
      case 'e': append(Kind::list, since_mark()); break;       // APPENDS
      case '}': collect(Kind::dict, 0); break;                 // EMPTY_DICT
      case 'd': collect(Kind::dict, since_mark()); break;      // DICT
      case 's': append(Kind::dict, 2); break;                  // SETITEM
      case 'u': append(Kind::dict, since_mark()); break;       // SETITEMS
      case 0x8f: push(kOtherNode); break;                      // EMPTY_SET
      case 0x90: drop(since_mark()); break;                    // ADDITEMS
      case 0x91: drop(since_mark()), push(kOtherNode); break;  // FROZENSET

      case 'c': global_of_lines(); break;   // GLOBAL
      case 0x93: global_of_stack(); break;  // STACK_GLOBAL
      case 'R': call(false); break;         // REDUCE
      case 0x81: call(true); break;         // NEWOBJ
      case 0x92: pop(), call(true); break;  // NEWOBJ_EX, with named arguments
      case 'i': call_of_lines(); break;     // INST
      case 'o': call_of_stack(); break;     // OBJ
      case 'b': build(); break;             // BUILD
      case 'Q': storage(); break;           // BINPERSID
      case 'P':
        check_.fail("has a text in place of a storage, as torch.save with protocol 0 writes it: PyTorch cannot read it");
      default: check_(false, "has the instruction 0x{:02x} at byte {}, which is not read", opcode, begin_);
    }
    return true;
  }

  // Throws for an instruction whose operands are missing.
  void expect(bool ok, std::string_view what) const { check_(ok, "must have {} for the instruction at byte {}", what, begin_); }

  // ---- Bytes ----------------------------------------------------------------------------------------------------------------

  std::string_view take(uint64_t size) {
    check_(size <= bytes_.size() - position_, "ends inside the instruction at byte {}", begin_);
    const auto* begin = reinterpret_cast<const char*>(bytes_.data()) + position_;
    position_ += size;
    return {begin, size};
  }

  template <typename T>
  T number() {
    T value = 0;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));  // NOLINT(bugprone-suspicious-stringview-data-usage): no text
    return value;
  }

  std::string_view line() {
    const auto* begin = reinterpret_cast<const char*>(bytes_.data()) + position_;
    const std::string_view rest(begin, bytes_.size() - position_);
    const auto size = rest.find('\n');
    check_(size != std::string_view::npos, "ends inside the instruction at byte {}", begin_);
    return take(size + 1).substr(0, size);
  }

  size_t index_of_line() {
    const auto index = json_number<uint64_t>(line());
    expect(index.has_value(), "a number");
    return *index;
  }

  // ---- Stack and memo -------------------------------------------------------------------------------------------------------

  size_t above_mark() const { return stack_.size() - (marks_.empty() ? 0 : marks_.back()); }

  void push(Id id) { stack_.push_back(id); }

  Id top() const {
    expect(above_mark() > 0, "a value");
    return stack_.back();
  }

  Id pop() {
    const auto id = top();
    stack_.pop_back();
    return id;
  }

  void pop_or_unmark() {
    if (above_mark() == 0 && !marks_.empty()) {
      marks_.pop_back();
    } else {
      pop();
    }
  }

  // Removes the last mark, and returns the number of values above it.
  size_t since_mark() {
    expect(!marks_.empty(), "a mark");
    const auto count = above_mark();
    marks_.pop_back();
    return count;
  }

  void drop(size_t count) {
    expect(above_mark() >= count, "more values");
    stack_.resize(stack_.size() - count);
  }

  void memoize(size_t index) {
    expect(index < 256 || index < position_, "a smaller number");  // writers count from zero
    if (index >= memo_.size()) memo_.resize(index + 1, kNowhere);
    memo_[index] = top();
  }

  void recall(size_t index) {
    expect(index < memo_.size() && memo_[index] != kNowhere, "a value kept under its number");
    push(memo_[index]);
  }

  // ---- Values ---------------------------------------------------------------------------------------------------------------

  Node& add(Kind kind) {
    push(static_cast<Id>(pickle_.nodes.size()));
    auto& node = pickle_.nodes.emplace_back();
    node.kind = kind;
    return node;
  }

  void push_integer(int64_t value) { add(Kind::integer).integer = value; }

  void push_long(std::string_view bytes) {  // little-endian, of any size, the highest bit being the sign
    if (bytes.size() > sizeof(int64_t)) return push(kOtherNode);
    uint64_t value = !bytes.empty() && (bytes.back() & 0x80) != 0 ? ~uint64_t{0} : 0;
    std::memcpy(&value, bytes.data(), bytes.size());
    push_integer(static_cast<int64_t>(value));
  }

  void push_real(uint64_t big_endian) { add(Kind::real).real = std::bit_cast<double>(__builtin_bswap64(big_endian)); }

  // INT and LONG; protocols 0 and 1 write booleans as 00 and 01.
  void push_decimal(std::string_view text) {
    if (text == "00" || text == "01") return push(text == "01" ? kTrueNode : kFalseNode);
    if (text.ends_with('L')) text.remove_suffix(1);
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc::result_out_of_range) return push(kOtherNode);
    expect(error == std::errc() && end == text.data() + text.size(), "an integer");
    push_integer(value);
  }

  void push_float(std::string_view text) {
    const auto value = json_number<double>(text);
    expect(value.has_value(), "a number");
    add(Kind::real).real = *value;
  }

  void push_text(std::string_view text) { set_text(add(Kind::text), text); }

  // Bytes in quotes, as Python's repr writes them.
  void push_quoted(std::string_view text) {
    const bool quoted = text.size() >= 2 && (text[0] == '\'' || text[0] == '"') && text.back() == text[0];
    expect(quoted, "a text in quotes");
    const auto inner = text.substr(1, text.size() - 2);
    if (inner.find('\\') == std::string_view::npos) return push_text(inner);
    std::string decoded;
    for (size_t i = 0; i < inner.size(); ++i) {
      if (inner[i] != '\\') {
        decoded += inner[i];
        continue;
      }
      expect(++i < inner.size(), "a character behind a backslash");
      constexpr std::string_view kLetters = "ntr\\'\"", kMeant = "\n\t\r\\'\"";
      const auto letter = kLetters.find(inner[i]);
      const auto code = inner[i] == 'x' ? hexadecimal_at(inner, i + 1, 2) : std::nullopt;
      expect(letter != std::string_view::npos || code.has_value(), "an escape that Python writes");
      decoded += code ? static_cast<char>(*code) : kMeant[letter];
      if (code) i += 2;
    }
    push_text(kept(std::move(decoded)));
  }

  // UTF-16 in Latin-1, with other characters as \uXXXX or \UXXXXXXXX.
  void push_escaped(std::string_view text) {
    const bool is_plain = std::ranges::none_of(text, [](char c) { return c == '\\' || (c & 0x80) != 0; });
    if (is_plain) return push_text(text);
    std::string decoded;
    for (size_t i = 0; i < text.size(); ++i) {
      const size_t digits = text.substr(i).starts_with("\\u") ? 4 : text.substr(i).starts_with("\\U") ? 8 : 0;
      const auto code = digits == 0 ? static_cast<unsigned char>(text[i]) : hexadecimal_at(text, i + 2, digits);
      expect(code.has_value(), "hexadecimal digits");
      append_utf8(decoded, *code);
      if (digits > 0) i += 1 + digits;
    }
    push_text(kept(std::move(decoded)));
  }

  static std::optional<uint32_t> hexadecimal_at(std::string_view text, size_t begin, size_t digits) {
    uint32_t value = 0;
    if (begin + digits > text.size()) return {};
    const auto* last = text.data() + begin + digits;
    const auto [end, error] = std::from_chars(text.data() + begin, last, value, 16);
    return error == std::errc() && end == last ? std::optional(value) : std::nullopt;
  }

  std::string_view kept(std::string text) { return *pickle_.texts.insert(std::move(text)).first; }

  void push_other(std::string_view) { push(kOtherNode); }

  static void set_text(Node& node, std::string_view text) {
    node.text = text.data();
    node.size = static_cast<uint32_t>(text.size());
  }

  // Replaces the last values of the stack with one that has them as items.
  void collect(Kind kind, size_t count) {
    expect(above_mark() >= count, "more values");
    const auto first = stack_.size() - count;
    add(kind);
    extend(stack_.back(), std::span(stack_).subspan(first, count));
    stack_[first] = stack_.back();
    stack_.resize(first + 1);
  }

  // Moves the last values of the stack into the one before them.
  void append(Kind kind, size_t count) {
    expect(above_mark() > count, "more values");
    const auto container = stack_[stack_.size() - count - 1];
    const auto found = pickle_.kind(container);
    if (found != Kind::foreign && found != Kind::other) {
      expect(found == kind, kind == Kind::list ? "a list" : "a dict");
      extend(container, std::span(stack_).last(count));
    }
    stack_.resize(stack_.size() - count);
  }

  // The items of one value are contiguous in the pool. Without space to grow they move to its end, with twice the space.
  void extend(Id id, std::span<const Id> more) {
    auto& node = pickle_.nodes[id];
    auto& pool = pickle_.pool;
    expect(node.kind != Kind::dict || more.size() % 2 == 0, "a value for each key");
    const size_t size = node.size + more.size();
    const size_t room = node.size == 0 ? 0 : std::bit_ceil(size_t{node.size});
    if (size > room) {
      const auto first = pool.size();
      pool.resize(first + std::bit_ceil(size));
      std::copy_n(pool.begin() + static_cast<ptrdiff_t>(node.first), node.size, pool.begin() + static_cast<ptrdiff_t>(first));
      node.first = first;
    }
    std::ranges::copy(more, pool.begin() + static_cast<ptrdiff_t>(node.first + node.size));
    node.size = static_cast<uint32_t>(size);
  }

  // ---- Globals and calls to them -------------------------------------------------------------------------------------------

  void global_of_lines() {
    const auto module = line();
    push_global(module, line());
  }

  void global_of_stack() {
    const auto name = pop();
    const auto module = pop();
    expect(pickle_.kind(name) == Kind::text && pickle_.kind(module) == Kind::text, "two texts");
    push_global(pickle_.text(module), pickle_.text(name));
  }

  void push_global(std::string_view module, std::string_view name) {
    const auto found = use_of(module == "__builtin__" ? "builtins" : module, name);
    if (!found) return set_text(add(Kind::foreign), kept(formatted("{}.{}", module, name)));
    const bool is_shown = found == Use::other_tensor;
    auto& node = add(Kind::global);
    node.use = static_cast<uint8_t>(*found);
    set_text(node, is_shown ? kept(formatted("{}.{}", module, name)) : name);
  }

  // Nothing for a foreign name.
  std::optional<Use> use_of(std::string_view module, std::string_view name) const {
    const auto* known = std::ranges::find_if(kGlobals, [&](const Globals& globals) {
      return globals.module == module && !name.empty() && std::ranges::count(globals.names, name) > 0;
    });
    if (known != kGlobals.end()) return known->use;
    if (module.starts_with("torch.") && name.starts_with("_rebuild_")) return Use::other_tensor;
    if (module == "torch" && name.find('.') == std::string_view::npos) return Use::name;  // classes of storages, types
    if (names_ == PickleNames::torchscript) return Use::script_object;
    return {};
  }

  // REDUCE or, `as_object`, NEWOBJ: replaces a global and a tuple of arguments with the result of the call.
  void call(bool as_object) {
    auto arguments = pop();
    auto global = pop();
    const bool is_foreign = pickle_.kind(global) == Kind::foreign;
    expect(pickle_.kind(arguments) == Kind::tuple && (is_foreign || pickle_.kind(global) == Kind::global),
           "a class and a tuple");
    if (is_foreign) return push(global);
    if (use(global) == Use::with_state) {
      const auto items = pickle_.items(arguments);
      const auto is = [&](size_t i, Kind kind) { return pickle_.kind(items[i]) == kind; };
      const bool sound = items.size() == 4 && is(2, Kind::tuple) &&
                         (is(0, Kind::foreign) ||
                          (is(0, Kind::global) && (use(items[0]) == Use::tensor || use(items[0]) == Use::other_tensor)));
      expect(sound, "a tensor with attributes");
      global = items[0];
      arguments = items[2];
      if (pickle_.kind(global) == Kind::foreign) return push_other_tensor(global);
    }
    const auto items = pickle_.items(arguments);
    switch (use(global)) {
      case Use::name: set_text(add(Kind::foreign), kept(formatted("torch.{}", pickle_.text(global)))); break;
      case Use::dict: push_dict({items.begin(), items.end()}); break;
      case Use::tensor: add_sharing(Kind::tensor, arguments); break;
      case Use::other_tensor: push_other_tensor(global); break;
      case Use::parameter:
        expect(!items.empty(), "an argument");
        pickle_.kind(items[0]) == Kind::foreign ? push_other_tensor(items[0]) : push(items[0]);
        break;
      case Use::first: expect(!items.empty(), "an argument"), push(items[0]); break;
      case Use::script_object: as_object ? void(add(Kind::object)) : push(kOtherNode); break;
      case Use::other: push(kOtherNode); break;
      case Use::with_state: break;  // has been replaced
    }
  }

  void call_of_lines() {
    collect(Kind::tuple, since_mark());
    const auto arguments = pop();
    global_of_lines();
    push(arguments);
    call(false);
  }

  void call_of_stack() {
    const auto count = since_mark();
    expect(count > 0, "a class");
    collect(Kind::tuple, count - 1);
    call(false);
  }

  // A tensor that is not read, with the name of the function or class that makes it.
  void push_other_tensor(Id name) { set_text(add(Kind::other_tensor), pickle_.text(name)); }

  // OrderedDict(), OrderedDict([[key, value], ...]) as Python 2 writes it, defaultdict(FACTORY).
  void push_dict(const std::vector<Id>& arguments) {
    add(Kind::dict);
    const auto dict = stack_.back();
    for (const auto argument : arguments) {
      if (pickle_.kind(argument) != Kind::list) continue;
      const auto count = pickle_.items(argument).size();
      copied_ += count;
      expect(copied_ <= position_, "fewer pairs");  // a list could be given again and again
      for (size_t i = 0; i < count; ++i) {
        const auto pair = pickle_.items(argument)[i];
        const auto kind = pickle_.kind(pair);
        expect((kind == Kind::list || kind == Kind::tuple) && pickle_.items(pair).size() == 2, "pairs");
        const std::array<Id, 2> entry = {pickle_.items(pair)[0], pickle_.items(pair)[1]};
        extend(dict, entry);
      }
    }
  }

  Use use(Id global) const { return static_cast<Use>(pickle_.nodes[global].use); }

  // A new value with the items of a tuple.
  void add_sharing(Kind kind, Id tuple) {
    auto& node = add(kind);
    node.first = pickle_.nodes[tuple].first;
    node.size = pickle_.nodes[tuple].size;
  }

  void build() {
    const auto state = pop();
    const auto kind = pickle_.kind(top());
    if (kind == Kind::dict || kind == Kind::tensor || kind == Kind::other_tensor) return;  // attributes, hooks
    if (kind == Kind::foreign || kind == Kind::other) return;
    expect(kind == Kind::object, "something that has a state");
    expect(pickle_.nodes[top()].size == 0, "an object without a state");
    extend(top(), {&state, 1});
  }

  void storage() {
    const auto tuple = pop();
    const auto items = pickle_.kind(tuple) == Kind::tuple ? pickle_.items(tuple) : std::span<const Id>();
    const auto has = [&](size_t i, Kind kind) { return i < items.size() && pickle_.kind(items[i]) == kind; };
    const auto is = [&](std::string_view what) { return has(0, Kind::text) && pickle_.text(items[0]) == what; };
    if (is("module") && has(1, Kind::foreign)) return push(items[1]);  // a class, with its source
    const bool sound = is("storage") && (has(1, Kind::global) || has(1, Kind::foreign)) && has(2, Kind::text) &&
                       has(3, Kind::text) && has(4, Kind::integer) && items.size() <= 6;
    expect(sound, "a storage's class, key, device and size");
    add_sharing(Kind::storage, tuple);
  }

  FileCheck check_;
  Bytes bytes_;
  PickleNames names_;
  size_t position_ = 0;
  size_t begin_ = 0;  // where the instruction begins
  std::vector<Id> stack_;
  std::vector<size_t> marks_;  // stack sizes at the marks
  std::vector<Id> memo_;
  size_t copied_ = 0;  // pairs
  Pickle pickle_;
};

}  // namespace

Pickle read_pickle(const std::string& path, Bytes bytes, PickleNames names) {
  return Machine(path, bytes, names).run();
}

}  // namespace xattn::detail
