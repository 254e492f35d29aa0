"""A steered Hugging Face model by plain PyTorch hooks, without a KV cache; knows nothing of the library's hosts."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import torch

POINTS = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")


def layout(attn, z, mlp, post, *, parallel=False, scale=1.0, mid=True, summed=True):
    """Candidate paths by point; of each the first that a block has is taken."""
    return {
        "attn_out": attn,
        "z": z,
        "mlp_out": mlp,
        "mlp_post": post,
        "scale": scale,
        "mid": mid and not parallel,
        "summed": summed,
    }


LLAMA = layout(["self_attn"], ["self_attn.o_proj"], ["mlp"], ["mlp.down_proj"])
GPT2 = layout(["attn"], ["attn.c_proj"], ["mlp"], ["mlp.c_proj"])
POST = layout(["post_attention_layernorm"], ["self_attn.o_proj"], ["post_feedforward_layernorm"], ["mlp.down_proj"])
OPT = layout(["self_attn"], ["self_attn.out_proj"], ["fc2"], ["fc2"])
NEOX = layout(["attention"], ["attention.dense"], ["mlp"], ["mlp.dense_4h_to_h"], parallel=True)
FALCON = layout(["self_attention"], ["self_attention.dense"], ["mlp"], ["mlp.dense_4h_to_h"], parallel=True)
HYBRID = layout(["self_attn", "linear_attn"], ["self_attn.o_proj"], ["mlp"], ["mlp.down_proj"])
GEMMA4 = POST | {"summed": False}
NONE = layout([], [], [], [], mid=False, summed=False)
DENSE = ["mlp.dense_4h_to_h"]

LAYOUTS = {
    "gpt2": GPT2,
    "gpt_neo": layout(["attn"], ["attn.attention.out_proj"], ["mlp"], ["mlp.c_proj"]),
    "pythia": NEOX,
    "gptj": layout(["attn"], ["attn.out_proj"], ["mlp"], ["mlp.fc_out"], parallel=True),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_vlm", "olmo2", "olmo3"), POST),
    **dict.fromkeys(("gemma4", "gemma4_kvshared", "gemma4_vlm"), GEMMA4),
    "gemma4_moe": GEMMA4 | {"mlp_post": []},
    **dict.fromkeys(("mamba", "mamba2"), NONE),
    "phi": layout(["self_attn"], ["self_attn.dense"], ["mlp"], ["mlp.fc2"], parallel=True),
    "falcon_new": FALCON,
    "falcon_alibi_seq": FALCON | {"mid": True},
    "bloom": layout(["self_attention.dense"], ["self_attention.dense"], DENSE, DENSE),
    **dict.fromkeys(("opt", "opt_wide"), OPT),
    "opt_postnorm": OPT | {"mid": False, "summed": False},
    **dict.fromkeys(("cohere", "cohere2"), LLAMA | {"mid": False}),
    "granite": LLAMA | {"scale": 0.3},
    "glm4": layout(["post_self_attn_layernorm"], ["self_attn.o_proj"], ["post_mlp_layernorm"], ["mlp.down_proj"]),
    "gpt_bigcode": GPT2,
    "mpt": layout(["attn"], ["attn.out_proj"], ["ffn.down_proj"], ["ffn.down_proj"]),
    "llama4_text": layout(["self_attn"], ["self_attn.o_proj"], ["feed_forward"], ["feed_forward.down_proj"]),
    "jamba": layout(["self_attn", "mamba"], ["self_attn.o_proj"], ["feed_forward"], ["feed_forward.down_proj"]),
    "falcon_h1": layout(
        [], ["self_attn.o_proj"], ["feed_forward"], ["feed_forward.down_proj"], mid=False, summed=False
    ),
    "lfm2": layout(["self_attn", "conv"], ["self_attn.out_proj"], ["feed_forward"], ["feed_forward.w2"]),
    **dict.fromkeys(("qwen3_next", "qwen3_5"), HYBRID),
    "openai_gpt": GPT2 | {"mid": False, "summed": False},
}
BLOCKS = {"qwen2_5_vl": "model.language_model.layers", "qwen3_vl": "model.language_model.layers"}
OTHER_LISTS = ("vision", "expert", "visual")


class Truth:
    """Where the points of a model are, and what it does with something added there."""

    def __init__(self, name, model):
        self.name, self.model = name, model
        self.layout = LAYOUTS.get(name, LLAMA)
        path = BLOCKS.get(name) or next(
            path
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and not any(word in path for word in OTHER_LISTS)
        )
        self.blocks = list(model.get_submodule(path))
        config = model.config.get_text_config()
        self.heads = getattr(config, "num_attention_heads", None)

    def module(self, layer, point):
        for path in self.layout[point]:
            found = self.blocks[layer]
            for name in path.split("."):
                found = getattr(found, name, None)
            if found is not None:
                return found
        return None

    def has(self, layer, point):
        if point in ("resid_pre", "resid_post"):
            return True
        if point == "resid_mid":
            return self.layout["mid"] and self.module(layer, "attn_out") is not None
        return self.module(layer, point) is not None

    @contextmanager
    def hooks(self, act):
        """`act(layer, point, x) -> x` at each point, in the order of the forward pass."""
        handles = []
        for layer in range(len(self.blocks)):
            handles += self._hooks_of(layer, act)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks_of(self, n, act):
        block, scale, handles, kept = self.blocks[n], self.layout["scale"], [], {}

        def enter(module, args, kwargs):
            name = "hidden_states" in kwargs
            x = kept["pre"] = act(n, "resid_pre", kwargs["hidden_states"] if name else args[0])
            return (args, {**kwargs, "hidden_states": x}) if name else ((x, *args[1:]), kwargs)

        def split(module, args):
            return (act(n, "z", args[0].unflatten(-1, (self.heads, -1))).flatten(-2), *args[1:])

        def attn(module, args, out):
            raw = first(out)
            y = act(n, "attn_out", raw * scale)
            if self.layout["mid"]:
                mid = kept["pre"] + y
                y = y + (act(n, "resid_mid", mid) - mid)
            return like(out, raw + (y - raw * scale) / scale)

        def neurons(module, args):
            return (act(n, "mlp_post", args[0].view(*kept["pre"].shape[:2], -1)).reshape(args[0].shape), *args[1:])

        def mlp(module, args, out):
            raw = first(out).view(kept["pre"].shape)
            y = act(n, "mlp_out", raw * scale)
            return like(out, (raw + (y - raw * scale) / scale).reshape(first(out).shape))

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        for point, function in (("z", split), ("mlp_post", neurons)):
            if self.module(n, point) is not None:
                handles.append(self.module(n, point).register_forward_pre_hook(function))
        for point, function in (("attn_out", attn), ("mlp_out", mlp)):
            if self.module(n, point) is not None:
                handles.append(self.module(n, point).register_forward_hook(function))
        handles.append(block.register_forward_hook(lambda m, args, out: like(out, act(n, "resid_post", first(out)))))
        return handles

    def run(self, ids, mask=None):
        mask = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            return self.model(**call_of(self.model, ids, mask)).logits

    def read(self, ids):
        """Every state, `{(layer, point): [batch pos ...]}`."""
        found = {}

        def keep(layer, point, x):
            found[layer, point] = x.detach().clone()
            return x

        with self.hooks(keep):
            self.run(ids)
        return found

    def added(self, u, layer, point, ids, mask=None, start=1):
        """Logits with `u` added at one point, to real tokens of a row from position `start` on."""
        mask = torch.ones_like(ids) if mask is None else mask
        chosen = (mask.cumsum(1) - 1 >= start) & (mask > 0)

        def act(at, where, x):
            if (at, where) != (layer, point):
                return x
            return x + torch.where(chosen.view(*chosen.shape, *[1] * (x.ndim - 2)), u, torch.zeros_like(u))

        with self.hooks(act):
            return self.run(ids, mask)

    def greedy(self, u, layer, point, ids, count, start):
        """A greedy continuation, every step a whole pass."""
        for _ in range(count):
            logits = self.added(u, layer, point, ids, start=start)
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return ids


def call_of(model, ids, mask):
    """Arguments of a whole pass: some libraries number the tokens of a padded row by themselves."""
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        call["position_ids"] = (mask.cumsum(1) - 1).clamp(0)
    return call


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def like(out, x):
    return x if isinstance(out, torch.Tensor) else type(out)([x, *out[1:]])
