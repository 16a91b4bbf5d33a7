// SPDX-License-Identifier: Apache-2.0
#include <xattn/mask.h>

#include <ATen/ops/add.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/any.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/le.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/where.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "attention/mask_parts.h"
#include "attention/softmax.h"
#include "base/check.h"
#include "base/check_tensor.h"
#include "base/describe.h"
#include "base/text.h"

namespace xattn {

using detail::check_type;
using detail::check_value;
using detail::kMinusInfinity;
using detail::shape_of;
using detail::type_of;

// Access to the parts of a mask, which are private to it.
struct detail::MaskAccess {
  using Kind = Mask::Kind;
  using Part = Mask::Part;
  static std::vector<Part>& parts(Mask& mask) { return mask.parts_; }
  static const std::vector<Part>& parts(const Mask& mask) { return mask.parts_; }
};

namespace {

using detail::MaskAccess;
using MaskPart = MaskAccess::Part;
using MaskKind = MaskAccess::Kind;

// The largest of the numbers that additive masks use instead of -inf.
constexpr double kForbidden = -10000;

// [Lq, Lk], [B, Lq, Lk] or [B|1, H|1, Lq|1, Lk] -> [B|1, H|1, Lq|1, Lk]
at::Tensor with_four_axes(const at::Tensor& tensor, std::string_view name) {
  check_value(tensor.dim() >= 2 && tensor.dim() <= 4, "mask",
              "{} must have shape [Lq, Lk], [B, Lq, Lk] or [B|1, H|1, Lq|1, Lk], but has {}.", name, shape_of(tensor));
  if (tensor.dim() == 2) return tensor.unsqueeze(0).unsqueeze(0);
  return tensor.dim() == 3 ? tensor.unsqueeze(1) : tensor;
}

void check_bool(const at::Tensor& tensor, std::string_view name) {
  check_type(tensor.defined() && tensor.scalar_type() == at::kBool, "mask", "{} must be bool, true = may attend, but is {}.",
             name, type_of(tensor));
  detail::check_dense("mask", name, tensor);
}

void check_bias(const at::Tensor& tensor, std::string_view name) {
  check_type(tensor.defined() && tensor.is_floating_point(), "mask", "{} must be of a floating point type, but is {}.", name,
             type_of(tensor));
  detail::check_dense("mask", name, tensor);
}

// torch's masks: a boolean, or an addend.
void check_torch_mask(const at::Tensor& tensor, std::string_view name) {
  check_type(tensor.scalar_type() == at::kBool || tensor.is_floating_point(), "mask",
             "{} must be bool or of a floating point type, but is {}.", name, type_of(tensor));
  detail::check_dense("mask", name, tensor);
}

bool is_causal(const MaskPart& part) {
  return part.kind == MaskKind::causal_upper_left || part.kind == MaskKind::causal_lower_right;
}

bool all_are_causal(const Mask& mask) {
  return std::ranges::all_of(MaskAccess::parts(mask), is_causal);
}

// The tensor of a part with an axis of Lk keys.
at::Tensor over_keys(const MaskPart& part, int64_t Lk) {
  return part.all_keys ? part.tensor.expand({-1, -1, -1, Lk}).contiguous() : part.tensor;  // kernels read along the keys
}

std::vector<at::Tensor> biases_of(const Mask& mask, int64_t Lk) {
  std::vector<at::Tensor> biases;
  for (const auto& part : MaskAccess::parts(mask)) {
    if (part.kind == MaskKind::bias) biases.push_back(over_keys(part, Lk));
  }
  return biases;
}

// The mask with `change` applied to every part that has a tensor.
template <class F>
Mask with_changed_tensors(Mask mask, const F& change) {
  for (auto& part : MaskAccess::parts(mask)) {
    if (part.tensor.defined()) change(part);
  }
  return mask;
}

// The mask without the parts that satisfy `condition`.
template <class F>
Mask without_parts(Mask mask, const F& condition) {
  std::erase_if(MaskAccess::parts(mask), condition);
  return mask;
}

std::vector<std::string_view> names_of_parts(const Mask& mask) {
  std::vector<std::string_view> names;
  for (const auto& part : MaskAccess::parts(mask)) names.emplace_back(part.name);
  return names;
}

// The same part of several masks, joined along the batch. Each comes with the size of its batch.
MaskPart joined_parts(const std::vector<std::pair<MaskPart, int64_t>>& parts) {
  auto joined = parts.front().first;
  const auto Lk = joined.tensor.size(3);
  int64_t H = 1, Lq = 1;
  for (const auto& [part, B] : parts) {
    const auto& tensor = part.tensor;
    check_value(tensor.size(0) == 1 || tensor.size(0) == B, "mask", "{} must fit its batch of {}, but has shape {}.", part.name,
                B, shape_of(tensor));
    if (tensor.size(1) != 1) H = tensor.size(1);
    if (tensor.size(2) != 1) Lq = tensor.size(2);
  }
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> lengths;
  bool in_host_memory = true;  // whether all lengths are
  for (const auto& [part, B] : parts) {
    const auto sizes = part.tensor.sizes();
    check_value((sizes[1] == 1 || sizes[1] == H) && (sizes[2] == 1 || sizes[2] == Lq) && sizes[3] == Lk, "mask",
                "masks must be of one size to be concatenated, but have shapes {} and {}.", shape_of(joined.tensor),
                shape_of(part.tensor));
    tensors.push_back(part.tensor.expand({B, H, Lq, -1}));
    in_host_memory &= B == 0 || !part.lengths.empty();
    for (int64_t b = 0; b < B && !part.lengths.empty(); ++b) {
      lengths.push_back(part.lengths[part.lengths.size() == 1 ? 0 : static_cast<size_t>(b)]);
    }
  }
  joined.tensor = at::cat(tensors);
  joined.all_keys = std::ranges::all_of(parts, [](const auto& one) { return one.first.all_keys; });
  joined.lengths = in_host_memory ? std::move(lengths) : std::vector<int64_t>();
  return joined;
}

// The i-th part of this kind, or null.
const MaskPart* part_of(const Mask& mask, MaskKind kind, size_t i) {
  for (const auto& part : MaskAccess::parts(mask)) {
    if (part.kind == kind && i-- == 0) return &part;
  }
  return nullptr;
}

// The i-th parts of this kind, joined along the keys. A mask without one leaves its keys as they are. No value if none has one.
std::optional<MaskPart> joined_along_keys(const std::vector<std::pair<Mask, int64_t>>& masks, MaskKind kind, size_t i) {
  const MaskPart* first = nullptr;
  std::vector<int64_t> sizes = {1, 1, 1, 0};
  auto type = at::kBool;
  for (const auto& [mask, Lk] : masks) {
    const auto* part = part_of(mask, kind, i);
    if (part == nullptr) continue;
    if (first == nullptr) first = part;
    type = at::promote_types(type, part->tensor.scalar_type());
    for (size_t axis = 0; axis < 3; ++axis) {
      const auto size = part->tensor.size(static_cast<int64_t>(axis));
      check_value(size == 1 || sizes[axis] == 1 || size == sizes[axis], "mask",
                  "masks must have one size on all axes but the keys to be joined, but have shapes {} and {}.",
                  shape_of(first->tensor), shape_of(part->tensor));
      if (size != 1) sizes[axis] = size;
    }
  }
  if (first == nullptr) return {};
  const auto unrestricted = at::full({1, 1, 1, 1}, kind == MaskKind::keep ? 1 : 0, first->tensor.options().dtype(type));
  std::vector<at::Tensor> tensors;
  for (const auto& [mask, Lk] : masks) {
    const auto* part = part_of(mask, kind, i);
    sizes[3] = Lk;
    tensors.push_back((part ? part->tensor.to(type) : unrestricted).expand(sizes));
  }
  auto joined = *first;
  joined.tensor = at::cat(tensors, 3);
  joined.all_keys = false;
  joined.lengths.clear();
  return joined;
}

}  // namespace

// ---- Builders --------------------------------------------------------------------------------------------------------------

Mask::Mask(Part part) : parts_{std::move(part)} {}

Mask Mask::key_padding(const at::Tensor& valid) {
  check_bool(valid, "key_padding");
  check_value(valid.dim() == 2, "mask", "key_padding must have shape [B, Lk], but has {}.", shape_of(valid));
  return Mask({Kind::keep, "key_padding", valid.unsqueeze(1).unsqueeze(1)});
}

Mask Mask::lengths(const at::Tensor& lengths, int64_t Lk) {
  check_type(lengths.defined() && at::isIntegralType(lengths.scalar_type(), /*includeBool=*/false), "mask",
             "lengths must be of an integer type, but is {}.", type_of(lengths));
  detail::check_dense("mask", "lengths", lengths);
  check_value(lengths.dim() == 1, "mask", "lengths must have shape [B], but has {}.", shape_of(lengths));
  check_value(Lk >= 0, "mask", "Lk must not be negative, but is {}.", Lk);
  if (lengths.is_cpu() && lengths.numel() > 0) {
    const auto least = lengths.min().item<int64_t>();
    const auto most = lengths.max().item<int64_t>();
    check_value(least >= 0 && most <= Lk, "mask", "lengths must lie in [0, {}], but hold {}.", Lk, least < 0 ? least : most);
  }
  const auto keys = at::arange(Lk, lengths.options().dtype(at::kLong));
  const auto valid = at::lt(keys.unsqueeze(0), lengths.unsqueeze(1));  // [B, Lk]
  Part part{Kind::keep, "lengths", valid.unsqueeze(1).unsqueeze(1)};
  if (lengths.is_cpu()) {
    const auto numbers = lengths.to(at::kLong).resolve_neg().contiguous();
    part.lengths.assign(numbers.const_data_ptr<int64_t>(), numbers.const_data_ptr<int64_t>() + numbers.numel());
  }
  return Mask(std::move(part));
}

Mask Mask::dense(const at::Tensor& keep) {
  check_bool(keep, "dense");
  return Mask({Kind::keep, "dense", with_four_axes(keep, "dense")});
}

Mask Mask::bias(const at::Tensor& bias) {
  check_bias(bias, "bias");
  return Mask({Kind::bias, "bias", with_four_axes(bias.resolve_neg(), "bias")});  // kernels read its memory
}

Mask Mask::causal(CausalAlignment alignment) {
  if (alignment == CausalAlignment::upper_left) return Mask({Kind::causal_upper_left, "causal, upper left"});
  return Mask({Kind::causal_lower_right, "causal, lower right"});
}

Mask Mask::from_multihead_attention(const at::Tensor& key_padding_mask, const at::Tensor& attn_mask, int64_t num_heads) {
  const auto convert = [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kBool ? dense(at::logical_not(tensor)) : bias(tensor);
  };
  check_value(num_heads >= 1, "mask", "num_heads must be at least 1, but is {}.", num_heads);
  Mask mask;
  if (key_padding_mask.defined()) {
    check_torch_mask(key_padding_mask, "key_padding_mask");
    check_value(key_padding_mask.dim() == 2, "mask", "key_padding_mask must have shape [B, Lk], but has {}.",
                shape_of(key_padding_mask));
    mask = mask & convert(key_padding_mask.unsqueeze(1));  // [B, 1, Lk]
  }
  if (attn_mask.defined()) {
    check_torch_mask(attn_mask, "attn_mask");
    check_value(attn_mask.dim() == 2 || (attn_mask.dim() == 3 && attn_mask.size(0) % num_heads == 0), "mask",
                "attn_mask must have shape [Lq, Lk] or [B * {}, Lq, Lk], but has {}.", num_heads, shape_of(attn_mask));
    mask =
        mask & convert(attn_mask.dim() == 2 ? attn_mask : attn_mask.unflatten(0, {attn_mask.size(0) / num_heads, num_heads}));
  }
  return mask;
}

Mask Mask::from_scaled_dot_product_attention(const at::Tensor& attn_mask, bool is_causal) {
  Mask mask = is_causal ? causal(CausalAlignment::upper_left) : Mask();
  if (!attn_mask.defined()) return mask;
  check_torch_mask(attn_mask, "attn_mask");
  check_value(attn_mask.dim() <= 4, "mask",
              "attn_mask must have shape [B|1, H|1, Lq|1, Lk|1] or leave out leading axes, but has {}.", shape_of(attn_mask));
  auto aligned = attn_mask;  // [B|1, H|1, Lq|1, Lk|1]
  while (aligned.dim() < 4) aligned = aligned.unsqueeze(0);
  auto given = attn_mask.scalar_type() == at::kBool ? dense(aligned) : bias(aligned);
  given.parts_.front().all_keys = aligned.size(3) == 1;
  return mask & given;
}

Mask Mask::from_additive(const at::Tensor& mask) {
  check_bias(mask, "from_additive");
  const auto forbidden = at::le(mask, kForbidden);  // NaN is not, and shows in the results
  return dense(at::logical_not(forbidden)) & bias(mask.masked_fill(forbidden, 0));
}

// ---- Combinations ----------------------------------------------------------------------------------------------------------

Mask operator&(const Mask& a, const Mask& b) {
  Mask both = a;
  for (const auto& part : b.parts_) {
    const auto place = std::ranges::upper_bound(both.parts_, part.kind, {}, &MaskPart::kind);
    const bool is_repeated = is_causal(part) && place != both.parts_.begin() && std::prev(place)->kind == part.kind;
    if (!is_repeated) both.parts_.insert(place, part);
  }
  return both;
}

bool Mask::is_none() const {
  return parts_.empty();
}

Mask Mask::slice(int64_t begin, int64_t end) const {
  check_value(0 <= begin && begin <= end, "mask", "batch entries must be [begin, end), but are [{}, {}).", begin, end);
  return with_changed_tensors(*this, [begin, end](Part& part) {
    if (part.tensor.size(0) == 1) return;
    check_value(end <= part.tensor.size(0), "mask", "batch entries must lie in [0, {}), but are [{}, {}).", part.tensor.size(0),
                begin, end);
    part.tensor = part.tensor.narrow(0, begin, end - begin);
    if (part.lengths.size() > 1) part.lengths = {part.lengths.begin() + begin, part.lengths.begin() + end};
  });
}

Mask Mask::cat(const std::vector<std::pair<Mask, int64_t>>& masks) {
  check_value(!masks.empty(), "mask", "masks must be at least one, but are none.");
  Mask joined = masks.front().first;
  const auto names = names_of_parts(joined);
  for (const auto& [mask, B] : masks) {
    check_value(names_of_parts(mask) == names, "mask", "masks must be built alike to be concatenated, but are of {} and {}.",
                detail::joined(names, " and "), detail::joined(names_of_parts(mask), " and "));
    check_value(B >= 0, "mask", "a batch must not be negative, but is {}.", B);
  }
  for (size_t i = 0; i < joined.parts_.size(); ++i) {
    if (is_causal(joined.parts_[i])) continue;
    std::vector<std::pair<Part, int64_t>> parts;
    for (const auto& [mask, B] : masks) parts.emplace_back(mask.parts_[i], B);
    joined.parts_[i] = joined_parts(parts);
  }
  return joined;
}

Mask Mask::to(at::Device device) const {
  return with_changed_tensors(*this, [device](Part& part) { part.tensor = part.tensor.to(device); });
}

// ---- mask_parts.h ----------------------------------------------------------------------------------------------------------

void detail::check_mask(
    const Mask& mask, std::string_view caller, int64_t B, int64_t H, std::optional<int64_t> Lq, int64_t Lk, at::Device device) {
  const auto fits = [](int64_t size, int64_t expected) { return size == 1 || size == expected; };
  for (const auto& [kind, name, tensor, all_keys, lengths] : MaskAccess::parts(mask)) {
    if (!tensor.defined()) continue;
    check_value(
        fits(tensor.size(0), B) && fits(tensor.size(1), H) && (!Lq || fits(tensor.size(2), *Lq)) &&
            (all_keys || tensor.size(3) == Lk),
        caller, "mask ({}) must fit [B, H, Lq, Lk] = [{}, {}, {}, {}], but has {}.", name, B, H,
        [Lq] { return Lq ? std::to_string(*Lq) : "Lq"; }, Lk, shape_of(tensor));
    check_type(tensor.device() == device, caller, "mask ({}) must be on {}, as the inputs, but is on {}.", name,
               detail::name_of(device), detail::name_of(tensor.device()));
  }
}

at::Tensor detail::allowed_keys(const Mask& mask, int64_t Lq, int64_t Lk, at::Device device) {
  at::Tensor all;
  const auto join = [&all](const at::Tensor& part) { all = all.defined() ? at::logical_and(all, part) : part; };
  for (const auto& part : MaskAccess::parts(mask)) {
    if (part.kind == MaskKind::keep) join(over_keys(part, Lk));
  }
  const auto last = causal_diagonal(mask, Lq, Lk);
  if (last) join(at::ones({1, 1, Lq, Lk}, at::dtype(at::kBool).device(device)).tril(*last));
  return all;
}

at::Tensor detail::total_bias(const Mask& mask, int64_t Lk, std::optional<at::ScalarType> logits) {
  const auto biases = biases_of(mask, Lk);
  if (biases.empty()) return {};
  if (!logits) {
    if (biases.size() == 1) return biases.front();
    logits = at::kFloat;
    for (const auto& bias : biases) logits = at::promote_types(*logits, bias.scalar_type());
  }
  const auto wide = wide_type(*logits);
  auto sum = biases.front().to(wide);
  for (size_t i = 1; i < biases.size(); ++i) sum = at::add(sum, biases[i].to(wide));
  if (*logits == wide) return sum;
  return sum.masked_fill(at::eq(sum.detach().to(*logits), kMinusInfinity), kMinusInfinity);
}

bool detail::has_bias(const Mask& mask) {
  return std::ranges::any_of(MaskAccess::parts(mask), [](const MaskPart& part) { return part.kind == MaskKind::bias; });
}

bool detail::is_learned(const Mask& mask) {
  return std::ranges::any_of(MaskAccess::parts(mask),
                             [](const MaskPart& part) { return part.kind == MaskKind::bias && part.tensor.requires_grad(); });
}

std::optional<int64_t> detail::causal_diagonal(const Mask& mask, int64_t Lq, int64_t Lk) {
  std::optional<int64_t> least;
  for (const auto& part : MaskAccess::parts(mask)) {
    if (!is_causal(part)) continue;
    const auto of_part = part.kind == MaskKind::causal_upper_left ? 0 : Lk - Lq;
    least = std::min(of_part, least.value_or(of_part));
  }
  return least;
}

Mask detail::without_causal(const Mask& mask) {
  return without_parts(mask, is_causal);
}

bool detail::is_causal_only(const Mask& mask, int64_t Lq, int64_t Lk) {
  return all_are_causal(mask) && causal_diagonal(mask, Lq, Lk) == 0;
}

bool detail::may_have_empty_rows(const Mask& mask, int64_t Lq, int64_t Lk) {
  const bool all_see_first_key = all_are_causal(mask) && causal_diagonal(mask, Lq, Lk).value_or(0) >= 0;
  return Lk == 0 || !all_see_first_key;
}

at::Tensor detail::rows_without_keys(
    const Mask& mask, int64_t Lq, int64_t Lk, at::Device device, std::optional<at::ScalarType> logits) {
  if (!may_have_empty_rows(mask, Lq, Lk)) return {};
  if (Lk == 0) return at::ones({1, 1, 1, 1}, at::dtype(at::kBool).device(device));
  const auto allowed = allowed_keys(mask, Lq, Lk, device);
  if (!has_bias(mask)) return at::logical_not(at::any(allowed, -1, /*keepdim=*/true));
  const auto bias = total_bias(mask, Lk, logits).detach();
  const auto all = allowed.defined() ? at::where(allowed, bias, kMinusInfinity) : bias;
  return at::eq(at::amax(all, -1, /*keepdim=*/true), kMinusInfinity);
}

Mask detail::with_bias_kv(const Mask& mask, int64_t Lq, int64_t Lk, at::Device device) {
  Mask longer;
  const auto allowed = allowed_keys(mask, Lq, Lk, device);
  if (allowed.defined()) longer = Mask::dense(at::constant_pad_nd(allowed, {0, 1}, true));
  for (const auto& bias : biases_of(mask, Lk)) longer = longer & Mask::bias(at::constant_pad_nd(bias, {0, 1}, 0));
  return longer;
}

std::vector<int64_t> detail::host_lengths(const Mask& mask) {
  std::vector<int64_t> least;
  for (const auto& part : MaskAccess::parts(mask)) {
    const auto& lengths = part.lengths;
    if (lengths.empty()) continue;
    if (least.empty()) least = lengths;
    check_value(lengths.size() == 1 || least.size() == 1 || lengths.size() == least.size(), "mask",
                "lengths must be of one batch size, but are of {} and of {}.", least.size(), lengths.size());
    if (least.size() == 1) least.resize(lengths.size(), least.front());
    for (size_t b = 0; b < least.size(); ++b) least[b] = std::min(least[b], lengths[lengths.size() == 1 ? 0 : b]);
  }
  return least;
}

Mask detail::without_lengths(const Mask& mask) {
  return without_parts(mask, [](const MaskPart& part) { return !part.lengths.empty(); });
}

int64_t detail::needed_keys(const Mask& mask, int64_t Lk) {
  const auto lengths = host_lengths(mask);
  const bool counts_from_last = std::ranges::any_of(
      MaskAccess::parts(mask), [](const MaskPart& part) { return part.kind == MaskKind::causal_lower_right; });
  if (lengths.empty() || counts_from_last) return Lk;
  return std::min(Lk, std::max<int64_t>(1, *std::ranges::max_element(lengths)));
}

Mask detail::first_keys(const Mask& mask, int64_t Lk) {
  const auto cut = with_changed_tensors(mask, [Lk](MaskPart& part) {
    if (part.all_keys) return;
    check_value(0 <= Lk && Lk <= part.tensor.size(3), "mask", "Lk must lie in [0, {}], but is {}.", part.tensor.size(3), Lk);
    part.tensor = part.tensor.narrow(3, 0, Lk);
    for (auto& length : part.lengths) length = std::min(length, Lk);
  });
  return without_parts(cut, [Lk](const MaskPart& part) {  // lengths that forbid none of these keys
    return !part.lengths.empty() && std::ranges::all_of(part.lengths, [Lk](int64_t length) { return length == Lk; });
  });
}

Mask detail::causal_part(const Mask& mask) {
  return without_parts(mask, [](const MaskPart& part) { return !is_causal(part); });
}

Mask detail::join_keys(const std::vector<std::pair<Mask, int64_t>>& masks) {
  auto joined = causal_part(masks.front().first);
  for (const auto& [mask, Lk] : masks) {
    check_value(names_of_parts(causal_part(mask)) == names_of_parts(joined), "mask",
                "masks must have the same causal part to be joined, because it counts over all keys, but they differ.");
  }
  auto& parts = MaskAccess::parts(joined);
  auto place = parts.begin();
  for (const auto kind : {MaskKind::keep, MaskKind::bias}) {
    for (size_t i = 0; auto part = joined_along_keys(masks, kind, i); ++i) place = std::next(parts.insert(place, *part));
  }
  return joined;
}

Mask detail::select_entries(const Mask& mask, const at::Tensor& indices) {
  return with_changed_tensors(mask, [&indices](MaskPart& part) {
    if (part.tensor.size(0) == 1) return;
    part.tensor = part.tensor.index_select(0, indices.to(part.tensor.device()));
    std::vector<int64_t> lengths;
    for (int64_t i = 0; !part.lengths.empty() && indices.is_cpu() && i < indices.numel(); ++i) {
      lengths.push_back(part.lengths[static_cast<size_t>(indices[i].item<int64_t>())]);
    }
    part.lengths = std::move(lengths);
  });
}

Mask detail::shard_of_keys(const Mask& mask, int64_t first, int64_t n, int64_t Lq, int64_t Lk, at::Device device) {
  check_value(Lq >= 0 && Lk >= 0, "mask", "Lq and Lk must not be negative, but are {} and {}.", Lq, Lk);
  check_value(first >= 0 && n >= 0 && n <= Lk - first, "mask",
              "keys [first, first + n) must lie in [0, {}), but are [{}, {} + {}).", Lk, first, first, n);
  const auto shard = with_changed_tensors(without_causal(mask), [=](MaskPart& part) {
    if (part.all_keys) return;
    check_value(part.tensor.size(3) == Lk, "mask", "{} must be for {} keys, but has shape {}.", part.name, Lk,
                shape_of(part.tensor));
    part.tensor = part.tensor.narrow(3, first, n);
    for (auto& length : part.lengths) length = std::clamp<int64_t>(length - first, 0, n);
  });
  const auto diagonal = causal_diagonal(mask, Lq, Lk);
  if (!diagonal || first + n - 1 <= *diagonal) return shard;  // every query attends to all of these keys
  const auto options = at::dtype(at::kLong).device(device);
  const auto last = at::arange(*diagonal, *diagonal + Lq, options).unsqueeze(1);
  return shard & Mask::dense(at::le(at::arange(first, first + n, options), last));
}

}  // namespace xattn
