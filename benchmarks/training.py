"""The training loop: precision, one step, the schedule, evaluation and sampling.

Used by train.py and training_speed.py. A plan is limited by steps and by seconds; the learning
rate follows whichever is further, so that its schedule completes on a slow machine too.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from bench import peak_memory_bytes
from corpus import Corpus, even_windows, random_windows, unigram_loss
from gpt import GPT, Preset, load_attention, make_optimizer
from torch import Tensor
from tqdm import tqdm

WARMUP_PROGRESS = 0.04
FINAL_RATE = 0.05
EVALUATIONS = 12
QUICK_WINDOWS = 32
FINAL_WINDOWS = 128
SAMPLE_TEMPERATURE = 0.8
BAR_SECONDS = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Where and in which dtype the model runs; parameters are fp32, bf16 runs under autocast."""

    device: torch.device
    dtype: torch.dtype

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context in which forward passes run."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            yield

    def synchronize(self) -> None:
        """Wait for the device's queue; nothing to do on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Trainer:
    """A model with its optimizer and one method that does a whole training step."""

    def __init__(
        self, preset: Preset, attention: str, context: int, precision: Precision, rate: float
    ) -> None:
        self.precision = precision
        self.model = GPT(preset, load_attention(attention), context, precision.dtype)
        self.model.to(precision.device)
        self.optimizer = make_optimizer(self.model, rate)

    def step(self, window: Tensor) -> Tensor:
        """Forward, backward, clip, update on window (batch, seqlen + 1); returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            loss = self.model.loss(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


@dataclass(frozen=True)
class Plan:
    """What to train: windows per step, bytes per window, and when to stop."""

    batch: int
    context: int
    steps: int
    seconds: float
    learning_rate: float
    seed: int


@dataclass
class Curves:
    """Losses in nats per byte, with the step at which each was taken."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Outcome:
    """What a training run gave."""

    curves: Curves
    steps: int
    batch: int
    seconds: float
    tokens_per_second: float
    held_out: float
    unigram: float
    peak_bytes: int

    @property
    def learned(self) -> bool:
        """Whether the model beats the unigram model; False for a NaN loss too."""
        return self.held_out < self.unigram


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine down to a small share; `progress` runs from 0 to 1."""
    warm = min(1.0, (progress + 1e-3) / WARMUP_PROGRESS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


@torch.no_grad()
def evaluate(trainer: Trainer, windows: Tensor, batch: int) -> float:
    """Mean loss over windows (count, context + 1), `batch` at a time."""
    total = 0.0
    for part in windows.split(batch):
        with trainer.precision.autocast():
            total += trainer.model.loss(part).item() * len(part)
    return total / len(windows)


def fit_batch(trainer: Trainer, data: Tensor, plan: Plan) -> int:
    """The largest of batch, batch / 2, ... whose forward and backward fit into memory."""
    batch = plan.batch
    windows = even_windows(data, batch, plan.context)
    while True:
        try:
            with trainer.precision.autocast():
                trainer.model.loss(windows[:batch]).backward()
            return batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        trainer.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        batch //= 2


def train(trainer: Trainer, corpus: Corpus, plan: Plan) -> Outcome:
    """Train until the plan's steps or seconds are used up; the rate's schedule ends with them."""
    if trainer.precision.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.precision.device)
    batch = fit_batch(trainer, corpus.train, plan)
    quick = even_windows(corpus.held_out, QUICK_WINDOWS, plan.context)
    generator = torch.Generator().manual_seed(plan.seed)
    curves, losses = Curves(), []
    evaluating, next_evaluation, next_refresh = 0.0, 0.0, 0.0
    step, progress, start = 0, 0.0, time.perf_counter()
    bar = tqdm(total=plan.steps, unit="step", desc="training", dynamic_ncols=True, file=sys.stdout)
    while progress < 1.0:
        if progress >= next_evaluation:
            began = time.perf_counter()
            curves.held_out.append((step, evaluate(trainer, quick, batch)))
            evaluating += time.perf_counter() - began
            next_evaluation += 1 / EVALUATIONS
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(progress, plan.learning_rate)
        losses.append(trainer.step(random_windows(corpus.train, batch, plan.context, generator)))
        step += 1
        elapsed = time.perf_counter() - start
        progress = max(step / plan.steps, elapsed / plan.seconds)
        if elapsed >= next_refresh or progress >= 1.0:
            bar.total = max(step, round(step / min(1.0, progress)))
            shown = {"train": f"{losses[-1]:.3f}", "held_out": f"{curves.held_out[-1][1]:.3f}"}
            bar.set_postfix(shown, refresh=False)
            bar.update(step - bar.n)
            next_refresh = time.perf_counter() - start + BAR_SECONDS
    trainer.precision.synchronize()
    elapsed = time.perf_counter() - start
    bar.close()
    curves.train = torch.stack(losses).float().tolist()
    final = even_windows(corpus.held_out, FINAL_WINDOWS, plan.context)
    curves.held_out.append((step, evaluate(trainer, final, batch)))
    return Outcome(
        curves=curves,
        steps=step,
        batch=batch,
        seconds=elapsed,
        tokens_per_second=step * batch * plan.context / (elapsed - evaluating),
        held_out=curves.held_out[-1][1],
        unigram=unigram_loss(corpus.train, final[:, 1:]),
        peak_bytes=peak_memory_bytes(trainer.precision.device),
    )


@torch.no_grad()
def generate(trainer: Trainer, prompt: str, length: int, seconds: float, seed: int) -> str:
    """Sample up to `length` bytes after `prompt`, fewer when `seconds` run out first."""
    device = trainer.precision.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())], device=device)
    deadline = time.perf_counter() + seconds
    for _ in range(length):
        if time.perf_counter() > deadline:
            break
        with trainer.precision.autocast():
            logits = trainer.model(tokens[:, -trainer.model.context :])[:, -1].float()
        chance = (logits / SAMPLE_TEMPERATURE).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(chance, 1, generator=generator)), dim=1)
    text = bytes(tokens[0].tolist()).decode("utf-8", errors="replace")
    return text.replace("\0", "\n<end of file>\n")
