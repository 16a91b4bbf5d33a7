// SPDX-License-Identifier: Apache-2.0
#include <xattn/mask.h>

#include <ATen/ops/add.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/any.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/le.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <limits>

#include "attention/softmax.h"
#include "base/check.h"
#include "base/describe.h"
#include "base/text.h"

namespace xattn {

using detail::check_type;
using detail::check_value;
using detail::kMinusInfinity;
using detail::shape_of;
using detail::type_of;

namespace {

// What additive masks put in place of -inf where they mean "never"; the least of the values in use.
constexpr double kForbidden = -10000;

// [Lq, Lk], [B, Lq, Lk] or [B|1, H|1, Lq|1, Lk] -> [B|1, H|1, Lq|1, Lk]
at::Tensor with_four_axes(const at::Tensor& tensor, std::string_view name) {
  check_value(tensor.dim() >= 2 && tensor.dim() <= 4, "mask",
              "{} must have shape [Lq, Lk], [B, Lq, Lk] or [B|1, H|1, Lq|1, Lk], but has {}.", name, shape_of(tensor));
  if (tensor.dim() == 2) return tensor.unsqueeze(0).unsqueeze(0);
  return tensor.dim() == 3 ? tensor.unsqueeze(1) : tensor;
}

// A sum of biases as logits of this type take it.
at::Tensor in_type_of_logits(const at::Tensor& sum, at::ScalarType logits) {
  if (logits == sum.scalar_type()) return sum;
  return sum.masked_fill(at::eq(sum.detach().to(logits), kMinusInfinity), kMinusInfinity);
}

void check_bool(const at::Tensor& tensor, std::string_view name) {
  check_type(tensor.defined() && tensor.scalar_type() == at::kBool, "mask", "{} must be bool, true = may attend, but is {}.",
             name, type_of(tensor));
}

void check_floating(const at::Tensor& tensor, std::string_view name) {
  check_type(tensor.defined() && tensor.is_floating_point(), "mask", "{} must be of a floating point type, but is {}.", name,
             type_of(tensor));
}

}  // namespace

Mask Mask::key_padding(const at::Tensor& valid) {
  check_bool(valid, "key_padding");
  check_value(valid.dim() == 2, "mask", "key_padding must have shape [B, Lk], but has {}.", shape_of(valid));
  Mask mask;
  mask.keep_.push_back({"key_padding", valid.unsqueeze(1).unsqueeze(1)});
  return mask;
}

Mask Mask::lengths(const at::Tensor& lengths, int64_t Lk) {
  check_type(lengths.defined() && at::isIntegralType(lengths.scalar_type(), /*includeBool=*/false), "mask",
             "lengths must be of an integer type, but is {}.", type_of(lengths));
  check_value(lengths.dim() == 1, "mask", "lengths must have shape [B], but has {}.", shape_of(lengths));
  check_value(Lk >= 0, "mask", "Lk must not be negative, but is {}.", Lk);
  if (lengths.is_cpu() && lengths.numel() > 0) {
    const auto least = lengths.min().item<int64_t>();
    const auto most = lengths.max().item<int64_t>();
    check_value(least >= 0 && most <= Lk, "mask", "lengths must lie in [0, {}], but hold {}.", Lk, least < 0 ? least : most);
  }
  const auto places = at::arange(Lk, lengths.options().dtype(at::kLong));
  Mask mask = key_padding(at::lt(places.unsqueeze(0), lengths.unsqueeze(1)));  // [B, Lk]
  mask.keep_.front().name = "lengths";
  if (lengths.is_cpu()) {
    const auto numbers = lengths.to(at::kLong).resolve_neg().contiguous();
    mask.keep_.front().lengths.assign(numbers.const_data_ptr<int64_t>(), numbers.const_data_ptr<int64_t>() + numbers.numel());
  }
  return mask;
}

Mask Mask::dense(const at::Tensor& keep) {
  check_bool(keep, "dense");
  Mask mask;
  mask.keep_.push_back({"dense", with_four_axes(keep, "dense")});
  return mask;
}

Mask Mask::bias(const at::Tensor& bias) {
  check_floating(bias, "bias");
  Mask mask;
  mask.bias_.push_back({"bias", with_four_axes(bias.resolve_neg(), "bias")});  // kernels read its memory
  return mask;
}

Mask Mask::causal(CausalAlignment alignment) {
  Mask mask;
  mask.upper_left_ = alignment == CausalAlignment::upper_left;
  mask.lower_right_ = alignment == CausalAlignment::lower_right;
  return mask;
}

Mask Mask::from_multihead_attention(const at::Tensor& key_padding_mask, const at::Tensor& attn_mask, int64_t num_heads) {
  const auto convert = [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kBool ? dense(at::logical_not(tensor)) : bias(tensor);
  };
  check_value(num_heads >= 1, "mask", "num_heads must be at least 1, but is {}.", num_heads);
  Mask mask;
  if (key_padding_mask.defined()) {
    check_value(key_padding_mask.dim() == 2, "mask", "key_padding_mask must have shape [B, Lk], but has {}.",
                shape_of(key_padding_mask));
    mask = mask & convert(key_padding_mask.unsqueeze(1));  // [B, 1, Lk]
  }
  if (attn_mask.defined()) {
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
  const auto aligned = attn_mask.dim() == 3 ? attn_mask.unsqueeze(0) : attn_mask;  // [1, H|1, Lq|1, Lk]
  return mask & (attn_mask.scalar_type() == at::kBool ? dense(aligned) : bias(aligned));
}

Mask Mask::from_additive(const at::Tensor& mask) {
  check_floating(mask, "from_additive");
  const auto keep = at::gt(mask, kForbidden);
  return dense(keep) & bias(mask.masked_fill(at::logical_not(keep), 0));
}

Mask operator&(const Mask& a, const Mask& b) {
  Mask both = a;
  both.keep_.insert(both.keep_.end(), b.keep_.begin(), b.keep_.end());
  both.bias_.insert(both.bias_.end(), b.bias_.begin(), b.bias_.end());
  both.upper_left_ |= b.upper_left_;
  both.lower_right_ |= b.lower_right_;
  return both;
}

bool Mask::is_none() const {
  return keep_.empty() && bias_.empty() && !upper_left_ && !lower_right_;
}

bool Mask::is_causal_only(int64_t Lq, int64_t Lk) const {
  return keep_.empty() && bias_.empty() && diagonal(Lq, Lk) == 0;
}

std::optional<int64_t> Mask::diagonal(int64_t Lq, int64_t Lk) const {
  if (!upper_left_ && !lower_right_) return std::nullopt;
  const int64_t lower_right = Lk - Lq;
  if (!upper_left_) return lower_right;
  return lower_right_ ? std::min<int64_t>(0, lower_right) : 0;
}

at::Tensor Mask::keep(int64_t Lq, int64_t Lk, at::Device device) const {
  at::Tensor all;
  const auto join = [&all](const at::Tensor& part) { all = all.defined() ? at::logical_and(all, part) : part; };
  for (const auto& part : keep_) join(part.tensor);
  if (const auto last = diagonal(Lq, Lk)) join(at::ones({1, 1, Lq, Lk}, at::dtype(at::kBool).device(device)).tril(*last));
  return all;
}

at::Tensor Mask::additive(std::optional<at::ScalarType> logits) const {
  if (bias_.empty()) return {};
  if (!logits) {
    if (bias_.size() == 1) return bias_.front().tensor;
    logits = at::kFloat;
    for (const auto& part : bias_) logits = at::promote_types(*logits, part.tensor.scalar_type());
  }
  const auto wide = detail::wide_type(*logits);
  at::Tensor sum;
  for (const auto& part : bias_) {
    const auto bias = part.tensor.to(wide);
    sum = sum.defined() ? at::add(sum, bias) : bias;
  }
  return in_type_of_logits(sum, *logits);
}

bool Mask::is_learned() const {
  return std::ranges::any_of(bias_, [](const Part& part) { return part.tensor.requires_grad(); });
}

bool Mask::may_have_empty_rows(int64_t Lq, int64_t Lk) const {
  const bool first_key_is_free = keep_.empty() && bias_.empty() && diagonal(Lq, Lk).value_or(0) >= 0;
  return Lk == 0 || !first_key_is_free;
}

at::Tensor Mask::empty_rows(int64_t Lq, int64_t Lk, at::Device device, std::optional<at::ScalarType> logits) const {
  if (!may_have_empty_rows(Lq, Lk)) return {};
  if (Lk == 0) return at::ones({1, 1, 1, 1}, at::dtype(at::kBool).device(device));
  const auto allowed = keep(Lq, Lk, device);
  if (bias_.empty()) return at::logical_not(at::any(allowed, -1, /*keepdim=*/true));
  const auto bias = additive(logits).detach();
  const auto all = allowed.defined() ? at::where(allowed, bias, kMinusInfinity) : bias;
  return at::eq(at::amax(all, -1, /*keepdim=*/true), kMinusInfinity);
}

void Mask::check(
    std::string_view caller, int64_t B, int64_t H, std::optional<int64_t> Lq, int64_t Lk, at::Device device) const {
  const auto fits = [](int64_t size, int64_t expected) { return size == 1 || size == expected; };
  for (const auto* parts : {&keep_, &bias_}) {
    for (const auto& [name, tensor, lengths] : *parts) {
      check_value(
          fits(tensor.size(0), B) && fits(tensor.size(1), H) && (!Lq || fits(tensor.size(2), *Lq)) && tensor.size(3) == Lk,
          caller, "mask ({}) must fit [B, H, Lq, Lk] = [{}, {}, {}, {}], but has {}.", name, B, H,
          Lq ? std::to_string(*Lq) : "Lq", Lk, shape_of(tensor));
      check_type(tensor.device() == device, caller, "mask ({}) must be on {}, as the inputs, but is on {}.", name, device.str(),
                 tensor.device().str());
    }
  }
}

Mask Mask::with_free_key(int64_t Lq, int64_t Lk, at::Device device) const {
  Mask mask;
  if (const auto allowed = keep(Lq, Lk, device); allowed.defined()) mask = dense(at::constant_pad_nd(allowed, {0, 1}, true));
  for (const auto& part : bias_) mask = mask & bias(at::constant_pad_nd(part.tensor, {0, 1}, 0));
  return mask;
}

std::vector<int64_t> Mask::host_lengths() const {
  std::vector<int64_t> least;
  for (const auto& part : keep_) {
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

Mask Mask::without_lengths() const {
  Mask rest = *this;
  std::erase_if(rest.keep_, [](const Part& part) { return !part.lengths.empty(); });
  return rest;
}

int64_t Mask::needed_keys(int64_t Lk) const {
  const auto lengths = host_lengths();
  if (lengths.empty() || lower_right_) return Lk;
  return std::min(Lk, std::max<int64_t>(1, *std::ranges::max_element(lengths)));
}

Mask Mask::first_keys(int64_t Lk) const {
  for (const auto* parts : {&keep_, &bias_}) {
    for (const auto& part : *parts) {
      check_value(0 <= Lk && Lk <= part.tensor.size(3), "mask", "Lk must lie in [0, {}], but is {}.", part.tensor.size(3), Lk);
    }
  }
  Mask cut = *this;
  std::erase_if(cut.keep_, [Lk](const Part& part) {  // says nothing of them
    return !part.lengths.empty() && std::ranges::all_of(part.lengths, [Lk](int64_t length) { return length >= Lk; });
  });
  for (auto* parts : {&cut.keep_, &cut.bias_}) {
    for (auto& part : *parts) {
      part.tensor = part.tensor.narrow(3, 0, Lk);
      for (auto& length : part.lengths) length = std::min(length, Lk);
    }
  }
  return cut;
}

Mask Mask::shard(int64_t first, int64_t n, int64_t Lq, int64_t Lk, at::Device device) const {
  check_value(Lq >= 0 && Lk >= 0, "mask", "Lq and Lk must not be negative, but are {} and {}.", Lq, Lk);
  check_value(first >= 0 && n >= 0 && n <= Lk - first, "mask",
              "keys [first, first + n) must lie in [0, {}), but are [{}, {} + {}).", Lk, first, first, n);
  for (const auto* parts : {&keep_, &bias_}) {
    for (const auto& each : *parts) {
      check_value(each.tensor.size(3) == Lk, "mask", "{} must be for {} keys, but has shape {}.", each.name, Lk,
                  shape_of(each.tensor));
    }
  }
  Mask part = *this;
  part.upper_left_ = part.lower_right_ = false;
  for (auto* parts : {&part.keep_, &part.bias_}) {
    for (auto& each : *parts) {
      each.tensor = each.tensor.narrow(3, first, n);
      for (auto& length : each.lengths) length = std::clamp<int64_t>(length - first, 0, n);
    }
  }
  const auto diagonal = this->diagonal(Lq, Lk);
  if (!diagonal || first + n - 1 <= *diagonal) return part;  // every query sees all of them
  const auto options = at::dtype(at::kLong).device(device);
  const auto last = at::arange(*diagonal, *diagonal + Lq, options).unsqueeze(1);
  return part & dense(at::le(at::arange(first, first + n, options), last));
}

Mask Mask::slice(int64_t begin, int64_t end) const {
  check_value(0 <= begin && begin <= end, "mask", "batch entries must be [begin, end), but are [{}, {}).", begin, end);
  Mask sliced = *this;
  for (auto* parts : {&sliced.keep_, &sliced.bias_}) {
    for (auto& part : *parts) {
      if (part.tensor.size(0) == 1) continue;
      check_value(end <= part.tensor.size(0), "mask", "batch entries must lie in [0, {}), but are [{}, {}).",
                  part.tensor.size(0), begin, end);
      part.tensor = part.tensor.narrow(0, begin, end - begin);
      if (part.lengths.size() > 1) part.lengths = {part.lengths.begin() + begin, part.lengths.begin() + end};
    }
  }
  return sliced;
}

Mask Mask::cat(const std::vector<std::pair<Mask, int64_t>>& masks) {
  check_value(!masks.empty(), "mask", "masks must be at least one, but are none.");
  Mask joined = masks.front().first;
  const auto names = [](const Mask& mask) {
    std::vector<std::string_view> all;
    for (const auto& part : mask.keep_) all.emplace_back(part.name);
    for (const auto& part : mask.bias_) all.emplace_back(part.name);
    return all;
  };
  for (const auto& [mask, B] : masks) {
    const bool alike = names(mask) == names(joined) && mask.keep_.size() == joined.keep_.size() &&
                       mask.upper_left_ == joined.upper_left_ && mask.lower_right_ == joined.lower_right_;
    check_value(alike, "mask", "masks must be built alike to be put behind each other, but are of {} and {}.",
                detail::joined(names(joined), " and "), detail::joined(names(mask), " and "));
    check_value(B >= 0, "mask", "a batch must not be negative, but is {}.", B);
  }
  const auto join = [&](std::vector<Part> Mask::* parts) {
    for (size_t i = 0; i < (joined.*parts).size(); ++i) {
      int64_t H = 1, Lq = 1;
      const auto first = (joined.*parts)[i];
      for (const auto& [mask, B] : masks) {
        const auto& tensor = (mask.*parts)[i].tensor;
        check_value(tensor.size(0) == 1 || tensor.size(0) == B, "mask", "{} must fit its batch of {}, but has shape {}.",
                    first.name, B, shape_of(tensor));
        if (tensor.size(1) != 1) H = tensor.size(1);
        if (tensor.size(2) != 1) Lq = tensor.size(2);
      }
      std::vector<at::Tensor> tensors;
      std::vector<int64_t> lengths;
      bool in_host_memory = true;  // all of the lengths
      for (const auto& [mask, B] : masks) {
        const auto& part = (mask.*parts)[i];
        const auto& sizes = part.tensor.sizes();
        check_value((sizes[1] == 1 || sizes[1] == H) && (sizes[2] == 1 || sizes[2] == Lq) && sizes[3] == first.tensor.size(3),
                    "mask", "masks must be of one size to be put behind each other, but have shapes {} and {}.",
                    shape_of(first.tensor), shape_of(part.tensor));
        tensors.push_back(part.tensor.expand({B, H, Lq, -1}));
        in_host_memory &= B == 0 || !part.lengths.empty();
        for (int64_t b = 0; b < B && !part.lengths.empty(); ++b) {
          lengths.push_back(part.lengths[part.lengths.size() == 1 ? 0 : static_cast<size_t>(b)]);
        }
      }
      auto& part = (joined.*parts)[i];
      part.tensor = at::cat(tensors);
      part.lengths = in_host_memory ? std::move(lengths) : std::vector<int64_t>();
    }
  };
  join(&Mask::keep_);
  join(&Mask::bias_);
  return joined;
}

Mask Mask::to(at::Device device) const {
  Mask moved = *this;
  for (auto* parts : {&moved.keep_, &moved.bias_}) {
    for (auto& part : *parts) part.tensor = part.tensor.to(device);
  }
  return moved;
}

}  // namespace xattn
