# SPDX-License-Identifier: Apache-2.0
"""Records what an attention layer of your own PyTorch model takes and gives, so that `xattn verify` can show that it gives the same.

    from record import record
    record(model, "model.decoder.layers.0.encoder_attn", "fixture.safetensors", lambda: model(**inputs))

The layer's projections are its torch.nn.Linear (or Conv1D) modules: the first to be called takes the query, the last gives the
output, those between take key and value. torch.nn.MultiheadAttention is known, too. Not for layers with norms of their own in
front of the projections (Flamingo, Perceiver). Needs torch and safetensors.
"""

import inspect

import torch
from safetensors.torch import save_file

MASKS = {"attention_mask", "mask", "encoder_attention_mask", "key_padding_mask", "attn_mask"}
HEADS = ("num_heads", "n_heads", "heads", "num_attention_heads", "n_head")


def four_axes(mask, name, heads):
    """[B, Lk], [B * heads, Lq, Lk] or, of attn_mask, [Lq, Lk], as [B | 1, H | 1, Lq | 1, Lk]."""
    if mask.dim() == 2:
        return mask[None, None] if name == "attn_mask" else mask[:, None, None]
    return mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask


def mask_tensors(masks, is_torch):
    """All masks in one: true = may attend; numbers are added to the logits, and those near the lowest forbid."""
    tensors = {}
    for mask in masks:
        is_bool = mask.dtype == torch.bool
        keep = (~mask if is_torch else mask) if is_bool else mask > -1e4
        tensors["mask"] = keep & tensors.get("mask", keep)
        if not is_bool and mask[keep].any():
            tensors["bias"] = mask.masked_fill(~keep, 0) + tensors.get("bias", 0)
    return tensors


@torch.no_grad()
def record(model, name, path, run):
    """Runs `run()`, which must call the layer `name` of `model` once, and writes its inputs and outputs to `path`."""
    layer, calls, masks = model.get_submodule(name), [], []
    is_torch = isinstance(layer, torch.nn.MultiheadAttention)
    projections = [m for m in layer.modules() if getattr(m, "weight", torch.empty(0)).dim() == 2 and not list(m.children())]

    def see_projection(_module, args, output):
        calls.append((args[0], output))

    def see_layer(_module, args, kwargs, output):
        arguments = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        for key in MASKS & arguments.keys():
            if isinstance(arguments[key], torch.Tensor):
                masks.append(four_axes(arguments[key], key, layer.num_heads if is_torch else 1))
        if is_torch:
            given = [*(arguments[key] for key in ("query", "key", "value")), output[0]]
            ordered = [x if layer.batch_first or x.dim() == 2 else x.transpose(0, 1) for x in given]
            calls.extend([(ordered[0], None), (ordered[1], None), (ordered[2], None), (None, ordered[3])])

    hooks = [layer.register_forward_hook(see_layer, with_kwargs=True)]
    hooks += [m.register_forward_hook(see_projection) for m in projections if not is_torch]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not 3 <= len(calls) <= 4:
        raise ValueError(f"{name} must be called once, by three or four projections, but {len(calls)} of them were called")
    tensors = {"query": calls[0][0], "key": calls[1][0], "value": calls[-2][0], "output": calls[-1][1]}
    tensors |= mask_tensors(masks, is_torch)
    metadata = {"prefix": name + ".", "class": type(layer).__qualname__, "torch": torch.__version__}
    heads = [getattr(m, key) for m in layer.modules() for key in HEADS if isinstance(getattr(m, key, None), int)]
    if heads:
        metadata["num_heads"] = str(heads[0])
    save_file({key: x.detach().clone().contiguous() for key, x in tensors.items()}, path, metadata)
