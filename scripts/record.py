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


def mask_tensors(mask, is_torch):
    """True = may attend; numbers are added to the logits, those near the lowest forbid."""
    if mask.dtype == torch.bool:
        return {"mask": ~mask if is_torch else mask}
    keep = mask > -1e4
    return {"mask": keep} if not mask[keep].any() else {"mask": keep, "bias": mask.masked_fill(~keep, 0)}


@torch.no_grad()
def record(model, name, path, run):
    """Runs `run()`, which must call the layer `name` of `model` once, and writes what it took and gave to `path`."""
    layer, calls, masks = model.get_submodule(name), [], {}
    is_torch = isinstance(layer, torch.nn.MultiheadAttention)
    projections = [m for m in layer.modules() if getattr(m, "weight", torch.empty(0)).dim() == 2 and not list(m.children())]

    def see_projection(_module, args, output):
        calls.append((args[0], output))

    def see_layer(_module, args, kwargs, output):
        arguments = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        for key in MASKS & arguments.keys():
            if isinstance(arguments[key], torch.Tensor):
                masks.update(mask_tensors(arguments[key], is_torch))
        if is_torch:
            ordered = [x if layer.batch_first else x.transpose(0, 1) for x in (*args[:3], output[0])]
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
    tensors = {"query": calls[0][0], "key": calls[1][0], "value": calls[-2][0], "output": calls[-1][1], **masks}
    metadata = {"prefix": name + ".", "class": type(layer).__qualname__, "torch": torch.__version__}
    heads = [getattr(m, key) for m in layer.modules() for key in HEADS if isinstance(getattr(m, key, None), int)]
    if heads:
        metadata["num_heads"] = str(heads[0])
    save_file({key: x.detach().clone().contiguous() for key, x in tensors.items()}, path, metadata)
