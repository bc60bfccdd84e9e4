"""Hugging Face models with attn_implementation="flash_attention_2", small and randomly initialised.

What they compute is held against the same weights with "eager" attention, which may round as often.
Runs where transformers is installed: on CUDA as a user would, and on the CPU with transformers told
that it may.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flash_attn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)


def make_distribution_known() -> None:
    """transformers asks for an installed distribution; give it one for a source tree that is not."""
    if "flash-attn" in importlib.metadata.packages_distributions().get("flash_attn", []):
        return
    folder = Path(tempfile.mkdtemp())
    info = folder / f"flash_attn-{flash_attn.__version__}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {flash_attn.__version__}\n"
    (info / "METADATA").write_text(metadata)
    (info / "top_level.txt").write_text("flash_attn\n")
    sys.path.append(str(folder))


make_distribution_known()

import transformers  # noqa: E402
from transformers import modeling_flash_attention_utils as client  # noqa: E402

FLASH = "flash_attention_2"
VOCABULARY = 96
# Large weights, so that attention is far from uniform.
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    initializer_range=0.1,
    pad_token_id=0,
)
GROUPED = dict(num_key_value_heads=2, head_dim=32, bos_token_id=1, eos_token_id=None)
WINDOW = 12


@dataclass(frozen=True)
class Client:
    """One architecture."""

    name: str
    is_causal: bool
    config: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return self.name

    def build(self, device: str, attention: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
        config = getattr(transformers, f"{self.name}Config")(**(SIZES | self.config | changes))
        head = "ForCausalLM" if self.is_causal else "ForMaskedLM"
        torch.manual_seed(0)
        kind = getattr(transformers, self.name + head)
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
        for name, p in model.named_parameters():
            if p.dim() == 1 and "bias" in name:
                nn.init.normal_(p, std=0.1)
        weights = model.state_dict()
        model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
        model.load_state_dict(weights)
        assert model.config._attn_implementation == attention
        return model.to(device, dtype)


CLIENTS = {
    "llama": Client("Llama", True, GROUPED),
    "qwen2": Client(
        "Qwen2",
        True,
        dict(
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
        ),
    ),
    "gemma2": Client(
        "Gemma2",
        True,
        GROUPED
        | dict(
            sliding_window=WINDOW,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=None,
            query_pre_attn_scalar=20,
        ),
    ),
    "bert": Client("Bert", False, dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
}
every_client = pytest.mark.parametrize("client_name", CLIENTS)
causal_clients = pytest.mark.parametrize(
    "client_name", [name for name, c in CLIENTS.items() if c.is_causal]
)


@pytest.fixture(autouse=True)
def allowed_on_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, transformers refuses flash_attention_2; nothing is changed with one."""
    if torch.cuda.is_available():
        return
    try:
        matrix = client.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        monkeypatch.setitem(matrix, "general_availability_check", lambda: True)
        monkeypatch.setitem(matrix, "supported_devices", ((lambda: True, "cpu"),))
        monkeypatch.setattr(client, "is_flash_attn_2_available", lambda: True)
    except (AttributeError, KeyError):
        pytest.skip("this version of transformers asks for a GPU in another way")


@dataclass
class Trio:
    """The same weights with our attention, with eager attention, and eager in fp64."""

    ours: nn.Module
    eager: nn.Module
    exact: nn.Module

    def each(self, function: Callable[[nn.Module], Any]) -> list[Any]:
        return [function(model) for model in (self.ours, self.eager, self.exact)]


def build(client_name: str, device: str, **changes: Any) -> Trio:
    """bf16 on CUDA, fp32 on the CPU."""
    c = CLIENTS[client_name]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ours = c.build(device, FLASH, dtype, **changes)
    eager = c.build(device, "eager", dtype, **changes)
    return Trio(ours, eager, copy.deepcopy(eager).double())


def assert_as_good(
    name: str, ours: Tensor, eager: Tensor, exact: Tensor, least: float = 0.0
) -> None:
    """At most twice eager's error, in relation to the norm of exact (or to least)."""
    assert ours.shape == exact.shape and ours.isfinite().all(), name
    floor = 1e-5 if ours.dtype == torch.float32 else 4e-3
    error, theirs = ((x.double() - exact).norm().item() for x in (ours, eager))
    limit = 2 * theirs + floor * (exact.norm().item() + least)
    assert error <= limit, f"{name}: error {error:.3g}, eager's {theirs:.3g}, limit {limit:.3g}"


def tokens(device: str, *shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randint(2, VOCABULARY, shape, generator=gen).to(device)


def gradients(model: nn.Module, logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Of the mean cross entropy where targets are not negative."""
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), targets.flatten(), ignore_index=-100
    )
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


def compare(trio: Trio, logits: list[Tensor], targets: Tensor) -> None:
    """Logits where there are targets, and the gradients of all parameters."""
    kept = targets >= 0
    assert_as_good("logits", *(x[kept].detach() for x in logits))
    models = (trio.ours, trio.eager, trio.exact)
    grads = [gradients(m, x, targets) for m, x in zip(models, logits)]
    largest = max(g.norm().item() for g in grads[2])
    for (name, _), *each in zip(trio.ours.named_parameters(), *grads):
        assert_as_good(name, *each, least=5e-2 * largest)


def wraps(outer: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Whether outer is function, or decorators and partial objects around it.

    transformers 5.23 puts torch.compiler.disable around the function for caches.
    """
    layer: Any = outer
    while layer is not None and layer is not function:
        partial = isinstance(layer, functools.partial)
        layer = layer.func if partial else getattr(layer, "__wrapped__", None)
    return layer is function


def test_wrappers_are_looked_through() -> None:
    ours, other = flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func
    for outer in (
        ours,
        torch.compiler.disable(ours),
        functools.partial(torch.compiler.disable(ours), causal=True),
    ):
        assert wraps(outer, ours) and not wraps(outer, other)
    assert not wraps(lambda *tensors: ours(*tensors), ours)


@every_client
def test_our_functions_are_used(client_name: str, device: str) -> None:
    CLIENTS[client_name].build(device, FLASH, torch.bfloat16)
    functions, _ = client.lazy_import_flash_attention(FLASH)
    ours = (
        *(flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func),
        *(flash_attn.flash_attn_with_kvcache, flash_attn.bert_padding.pad_input),
        flash_attn.bert_padding.unpad_input,
    )
    assert len(functions) == len(ours)
    for theirs, function in zip(functions, ours):
        assert wraps(theirs, function), (theirs, function)


@every_client
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_full_batch(client_name: str, checkpointing: bool, device: str) -> None:
    trio = build(client_name, device)
    ids = tokens(device, 2, 41)
    if checkpointing:
        trio.ours.train()
        trio.ours.gradient_checkpointing_enable()
    compare(trio, trio.each(lambda m: m(input_ids=ids).logits), tokens(device, 2, 41).flip(0))


LENGTHS = [41, 17, 1, 30]


def padding_mask(side: str, device: str) -> Tensor:
    place = torch.arange(max(LENGTHS), device=device)
    lengths = torch.tensor(LENGTHS, device=device)[:, None]
    return (place < lengths if side == "right" else place >= max(LENGTHS) - lengths).long()


def alone(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of each sequence without its padding, put where its tokens are."""
    logits = []
    for row, there in zip(ids, mask.bool()):
        out = model(input_ids=row[there][None]).logits[0]
        logits.append(out.new_zeros(len(row), out.shape[-1]).masked_scatter(there[:, None], out))
    return torch.stack(logits)


@every_client
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_padded_batch(client_name: str, side: str, checkpointing: bool, device: str) -> None:
    trio = build(client_name, device)
    mask = padding_mask(side, device)
    ids = tokens(device, *mask.shape) * mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if checkpointing:
        trio.ours.train()
        trio.ours.gradient_checkpointing_enable()
    ours = trio.ours(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    targets = torch.where(mask > 0, tokens(device, *mask.shape).flip(0), -100)
    compare(trio, [ours, *(alone(m, ids, mask) for m in (trio.eager, trio.exact))], targets)


@every_client
@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens"])
def test_packed_batch(client_name: str, boundaries: str, device: str) -> None:
    """Sequences one after the other in one row, against each on its own."""
    trio = build(client_name, device)
    ids = tokens(device, 1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None]
    packed: dict[str, Any] = dict(position_ids=positions)
    if boundaries == "cu_seq_lens":
        ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
        packed |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
        packed |= dict(max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))

    def apart(model: nn.Module) -> Tensor:
        return torch.cat([model(input_ids=row).logits for row in ids.split(LENGTHS, 1)], 1)

    logits = [trio.ours(input_ids=ids, **packed).logits, apart(trio.eager), apart(trio.exact)]
    compare(trio, logits, tokens(device, 1, sum(LENGTHS)).flip(1))


@causal_clients
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_generation(client_name: str, padded: bool, device: str) -> None:
    """Logits of each step, with a cache, against one pass over what came out."""
    trio = build(client_name, device)
    new = 6
    mask = padding_mask("left", device) if padded else torch.ones(2, 20, device=device).long()
    ids = tokens(device, *mask.shape) * mask
    result = trio.ours.eval().generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    sequences = result.sequences
    assert sequences.shape == (ids.shape[0], ids.shape[1] + new)
    mask = torch.cat((mask, mask.new_ones(len(mask), new)), 1)
    with torch.no_grad():
        eager, exact = (
            alone(m, sequences, mask)[:, -new - 1 : -1] for m in (trio.eager, trio.exact)
        )
    ours = torch.stack(result.logits, 1).to(eager.dtype)
    assert_as_good("logits", ours, eager, exact)


def test_attention_dropout_is_drawn_again_under_checkpointing(device: str) -> None:
    """The same seed gives the same gradients with and without checkpointing, and others else."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ids = tokens(device, 2, 41)
    targets = tokens(device, 2, 41).flip(0)
    results = []
    for checkpointing, seed in ((False, 0), (True, 0), (False, 1)):
        model = CLIENTS["llama"].build(device, FLASH, dtype, attention_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(seed)
        grads = gradients(model, model(input_ids=ids).logits, targets)
        results.append(torch.cat([g.flatten() for g in grads]).double())
    scale = results[0].norm().item()
    assert (results[1] - results[0]).norm().item() < 1e-2 * scale
    assert (results[2] - results[0]).norm().item() > 1e-1 * scale


@pytest.mark.cuda
def test_fp32_weights_under_autocast(device: str) -> None:
    c = CLIENTS["llama"]
    ids = tokens(device, 2, 41)
    ours, eager = (c.build(device, kind, torch.float32) for kind in (FLASH, "eager"))
    exact = copy.deepcopy(eager).double()(input_ids=ids).logits
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours, eager = (m(input_ids=ids).logits.bfloat16() for m in (ours, eager))
    assert_as_good("logits", ours, eager, exact)
    ours.float().sum().backward()
