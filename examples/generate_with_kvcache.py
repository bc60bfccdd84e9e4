"""Text from a Hugging Face Llama with keys and values in a cache that flash_attn updates in place.

Twice, and checked both times against the model's own forward pass with eager attention:

1. A decoding loop of our own. The caches are allocated once. Each step hands the new q, k and v to
   flash_attn_with_kvcache, which rotates q and k, appends k and v, and attends. Prompts of different
   lengths share a batch. On a GPU the step is one CUDA graph.
2. transformers' generate_batch (continuous batching) with "paged|flash_attention_2", which calls
   flash_attn_with_kvcache with a block table. On a GPU, where transformers offers it.

Without arguments: a small Llama with random weights, which needs no network. --model takes a name
or a folder of Llama weights. Without a GPU the first part runs on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import flash_attn
from flash_attn import flash_attn_with_kvcache

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROMPTS = ("The capital of France is", "Once upon a time", "1, 1, 2, 3, 5, 8, 13,")
RANDOM_LENGTHS = (5, 17, 11)  # of the prompts of a model without a tokenizer
ROUNDING = 1e-4  # of the largest logit; what is allowed beside twice the eager model's own error
PAGE_SIZE, PAGES, BATCH_TOKENS = 256, 64, 512  # of transformers' paged cache


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", help="of the Llama class; default: small, with random weights")
    add("--prompt", nargs="+", default=list(PROMPTS), help="for --model")
    add("--new-tokens", type=int, default=32)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU")
    add("--no-graph", action="store_true", help="launch every step anew")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.new_tokens < 1:
        parser.error(f"--new-tokens: must be at least 1; got {args.new_tokens}")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


def load(args: argparse.Namespace) -> tuple[nn.Module, list[list[int]], Callable[[list[int]], str]]:
    """The model, the prompts' token ids, and what turns ids into text."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    options = {"dtype": DTYPES[args.dtype], "attn_implementation": "eager"}
    if args.model:
        model = LlamaForCausalLM.from_pretrained(args.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        return model.to(args.device), tokenizer(args.prompt)["input_ids"], tokenizer.decode
    # Wide initial weights, so that a query prefers some keys over others.
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=3, initializer_range=0.08)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM._from_config(config, **options)
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in RANDOM_LENGTHS]
    return model.to(args.device), prompts, lambda ids: " ".join(map(str, ids))


class Decoder:
    """A Llama's weights with preallocated caches, one per layer: (batch, capacity, heads_k, d)."""

    def __init__(self, model: nn.Module, batch: int, capacity: int) -> None:
        config, weights = model.config, model.model
        attention = weights.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.layers, self.embed = weights.layers, weights.embed_tokens
        self.norm, self.head = weights.norm, model.lm_head
        like = self.embed.weight
        shape = (len(self.layers), batch, capacity, config.num_key_value_heads, self.head_dim)
        self.k_caches, self.v_caches = (
            torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2)
        )
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=like.device)
        positions = torch.arange(capacity, device=like.device)[None]
        # transformers repeats the angles for both halves of head_dim; one half is the table.
        self.cos, self.sin = (
            table[0, :, : self.head_dim // 2].contiguous()
            for table in weights.rotary_emb(like, positions)
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch, n) to every sequence; what the last layer gives for them.

        The caller advances cache_seqlens, by as many tokens as count.
        """
        x = self.embed(tokens)
        for layer, k_cache, v_cache in zip(self.layers, self.k_caches, self.v_caches, strict=True):
            normed, attention = layer.input_layernorm(x), layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (f(normed).unflatten(-1, (-1, self.head_dim)) for f in projections)
            out = flash_attn_with_kvcache(
                *(q, k_cache, v_cache, k, v, self.cos, self.sin),
                cache_seqlens=self.cache_seqlens,
                softmax_scale=attention.scaling,
                causal=True,
                rotary_interleaved=False,
            )
            x = x + attention.o_proj(out.flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Fill the caches; logits (batch, vocabulary) after each prompt's last token.

        Shorter prompts are padded on the right. No real token attends to padding, and later tokens
        overwrite it, because they are appended where the prompt ends.
        """
        lengths = torch.tensor([len(p) for p in prompts], device=self.cos.device)
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        hidden = self.hidden(tokens.to(self.cos.device))
        self.cache_seqlens.copy_(lengths)
        return self.head(hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1])

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every sequence, (batch, 1); logits (batch, vocabulary)."""
        logits = self.head(self.hidden(tokens)[:, -1])
        self.cache_seqlens += 1
        return logits


def captured(step: Callable[[Tensor], Tensor], decoder: Decoder, tokens: Tensor) -> Callable:
    """`step` as a CUDA graph that reads `tokens`; the decoder is left as it was."""
    before = decoder.cache_seqlens.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(tokens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(tokens)
    decoder.cache_seqlens.copy_(before)  # the row that was written is written again

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return logits

    return replay


@torch.no_grad()
def generate(
    model: nn.Module, prompts: list[list[int]], new_tokens: int, graph: bool
) -> tuple[Tensor, Tensor, float]:
    """New tokens (batch, new_tokens), their logits (batch, new_tokens, vocabulary), ms per step."""
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + new_tokens)
    logits = [decoder.prefill(prompts)]
    tokens = logits[0].argmax(-1, keepdim=True)
    chosen = [tokens.clone()]
    step = captured(decoder.step, decoder, tokens) if graph else decoder.step
    synchronize = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(new_tokens - 1):
        logits.append(step(tokens).clone())
        tokens.copy_(logits[-1].argmax(-1, keepdim=True))
        chosen.append(tokens.clone())
    synchronize()
    milliseconds = 1e3 * (time.perf_counter() - start) / max(1, new_tokens - 1)
    return torch.cat(chosen, 1), torch.stack(logits, 1), milliseconds


class Judge:
    """The same model with eager attention, in its own dtype and in a wider one."""

    def __init__(self, model: nn.Module) -> None:
        wider = torch.float64 if model.dtype == torch.float32 else torch.float32
        self.model, self.exact = model, copy.deepcopy(model).to(wider)

    @torch.no_grad()
    def logits(self, prompt: list[int], new: list[int]) -> tuple[Tensor, float]:
        """Exact logits for each new token, and what our error may be: twice the eager model's."""
        ids = torch.tensor([prompt + new[:-1]], device=self.model.device)
        eager, exact = (
            m(ids, use_cache=False).logits[0, len(prompt) - 1 :] for m in (self.model, self.exact)
        )
        error = (eager - exact).abs().max().item()
        return exact, 2 * error + ROUNDING * exact.abs().max().item()

    def check_logits(self, prompt: list[int], new: list[int], logits: Tensor) -> str:
        """Compare logits (new tokens, vocabulary); raises ValueError when they differ by more."""
        exact, allowed = self.logits(prompt, new)
        error = (logits - exact).abs().max().item()
        text = f"largest error {error:.1e}, allowed {allowed:.1e}"
        if not error <= allowed:
            raise ValueError(f"the logits are wrong: {text}")
        return text

    def check_greedy(self, prompt: list[int], new: list[int]) -> str:
        """Each token's logit is the largest, as far as errors allow; raises ValueError if not."""
        if not new:
            raise ValueError("no tokens")
        exact, allowed = self.logits(prompt, new)
        tokens = torch.tensor(new, device=exact.device)[:, None]
        gap = (exact.amax(-1) - exact.gather(1, tokens)[:, 0]).max().item()
        text = f"largest distance from the best logit {gap:.1e}, allowed {2 * allowed:.1e}"
        if not gap <= 2 * allowed:
            raise ValueError(f"a token is not the most likely one: {text}")
        return text


def generate_paged(
    model: nn.Module, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], int] | str:
    """transformers' continuous batching: new tokens, and how often it called our cache function.

    Text instead: why it cannot run here.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.utils import is_flash_attn_2_available
    except ImportError as error:
        return f"not in this version of transformers ({error})"
    if not is_flash_attn_2_available():
        return "transformers takes flash_attn from an installed package and on a GPU only"
    if model.device.type != "cuda":
        return f"transformers runs it on a GPU only; the model is on {model.device}"
    calls = 0
    ours = flash_attn.flash_attn_with_kvcache

    @functools.wraps(ours)
    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return ours(*args, **options)

    paged = copy.deepcopy(model)
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    sizes = {"block_size": PAGE_SIZE, "num_blocks": PAGES, "max_batch_tokens": BATCH_TOKENS}
    flash_attn.flash_attn_with_kvcache = counted  # transformers imports it on first use
    try:
        paged.set_attn_implementation("paged|flash_attention_2")
        results = paged.generate_batch(
            inputs=prompts,
            generation_config=greedy,
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
        )
    finally:
        flash_attn.flash_attn_with_kvcache = ours
    by_prompt = {tuple(r.prompt_ids): list(r.generated_tokens) for r in results.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts], calls


def main(argv: list[str] | None = None) -> int:
    """Generate and check; returns the exit code."""
    args = parse_args(argv)
    try:
        import transformers
    except ImportError:
        print("generate_with_kvcache.py needs transformers: pip install transformers")
        return 2
    model, prompts, text = load(args)
    model.eval()
    print(f"transformers {transformers.__version__}, {args.device}, {args.dtype}")
    judge = Judge(model)
    graph = model.device.type == "cuda" and not args.no_graph
    new, logits, milliseconds = generate(model, prompts, args.new_tokens, graph)
    how = "one CUDA graph per step" if graph else "without a graph"
    print(f"our loop: {len(prompts)} sequences, {milliseconds:.2f} ms per step, {how}")
    try:
        for prompt, ids, found in zip(prompts, new.tolist(), logits, strict=True):
            print(f"  {judge.check_logits(prompt, ids, found)}: {text(prompt)} | {text(ids)}")
        paged = generate_paged(model, prompts, args.new_tokens)
        if isinstance(paged, str):
            print(f"generate_batch: {paged}")
            return 0
        sequences, calls = paged
        print(f"generate_batch: {calls} calls of flash_attn_with_kvcache from Python")
        for prompt, ids in zip(prompts, sequences, strict=True):
            print(f"  {judge.check_greedy(prompt, ids)}: {text(prompt)} | {text(ids)}")
    except ValueError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
