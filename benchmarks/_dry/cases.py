"""Training and generation that run both ways, computed and dry, to compare memory.

``CASES`` maps names to functions without arguments, which run on ``cuda``; ``measure`` runs one and
returns what torch's allocator did. A process measures any number of them in turn.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._dry import models
from benchmarks._dry.compare import COUNTS, PEAKS
from spillover import StateError, emulator

Optimizer = Callable[[Any], torch.optim.Optimizer]
Loss = Callable[[], Tensor]
_STEPS = 2
#: Small enough that no gradient of a case overflows: dry runs take gradients as finite.
_SCALE = 256.0
_EXPERTS = 8


def measure(case: Callable[[], None]) -> dict[str, int]:
    """Run a case from an empty cache; peaks are absolute, counts and times of this case alone.

    Times, which end in ``_ns``, are there under the virtual clock: of the case, and for which each
    resource worked.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    before, times_before = torch.cuda.memory_stats(), _times()
    case()
    torch.cuda.synchronize()
    after, times = torch.cuda.memory_stats(), _times()
    values = {name: time - times_before.get(name, 0) for name, time in times.items()}
    values |= {name: int(after.get(name, 0)) for name in PEAKS}
    return values | {name: int(after.get(name, 0)) - int(before.get(name, 0)) for name in COUNTS}


def _times() -> dict[str, int]:
    try:
        report = emulator.clock_report()
    except StateError:  # the clock is off
        return {}
    return {"makespan_ns": report.makespan_ns} | {
        f"{use.name}_ns": use.busy_ns for use in report.resources
    }


def _adamw(**options: Any) -> Optimizer:
    return functools.partial(torch.optim.AdamW, lr=1e-3, **options)


def _train(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    *,
    amp: torch.dtype | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = optimizer(trained)
    scaler = torch.amp.GradScaler("cuda", init_scale=_SCALE, enabled=amp == torch.float16)
    for _ in range(_STEPS):
        steps.zero_grad()
        with context(), torch.autocast("cuda", dtype=amp, enabled=amp is not None):
            value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(steps)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(steps)
        scaler.update()
    assert scaler.get_scale() in (1.0, _SCALE), "an overflow that did not happen"


def _tokens(batch: int = 4, length: int = 97) -> Tensor:
    return torch.randint(0, 1000, (batch, length), device="cuda")


def _language(
    optimizer: Optimizer,
    *,
    dtype: torch.dtype = torch.float32,
    amp: torch.dtype | None = None,
    low_rank: bool = False,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    **options: Any,
) -> None:
    with torch.device("cuda"):
        model = models.LanguageModel(**options).to(dtype)
        if low_rank:
            models.add_low_rank(model).to(dtype)

    def loss() -> Tensor:
        tokens = _tokens()
        scores = model(tokens[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())

    _train(model, loss, optimizer, amp=amp, context=context)


def _vision(
    model_class: Callable[[], nn.Module],
    optimizer: Optimizer,
    *,
    amp: torch.dtype | None = None,
    channels_last: bool = False,
    dense: bool = False,
) -> None:
    model = model_class().cuda()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        images = torch.randn(4, 3, 64, 64).cuda()
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if dense:
            return F.mse_loss(model(images), images)
        labels = torch.randint(0, 10, (4,)).cuda()
        return F.cross_entropy(model(images), labels, label_smoothing=0.1)

    _train(model, loss, optimizer, amp=amp)


def _recurrent() -> None:
    model = models.Recurrent().cuda()

    def loss() -> Tensor:
        tokens = _tokens(length=17)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    _train(model, loss, _adamw())


@torch.no_grad()
def _generate() -> None:
    with torch.device("cuda"):
        model = models.LanguageModel(llama=True).eval()
    caches: list[list[Tensor]] = [[] for _ in model.blocks]
    tokens = _tokens(length=32)
    finished = torch.zeros(4, dtype=torch.bool, device="cuda")
    lengths = torch.full((4,), 32, device="cuda")
    while not bool(finished.all()):  # lengths are small and known
        scores = model(tokens, caches)[:, -1]
        tokens = torch.multinomial(scores.softmax(-1), 1)
        lengths += 1
        finished = lengths >= 48


def _hugging_face(**options: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = options.pop("checkpoint", False)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        use_cache=False,
        **options,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable()

    def loss() -> Tensor:
        tokens = _tokens()
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
        value: Tensor = model(input_ids=tokens, attention_mask=mask, labels=tokens).loss
        return value

    _train(model, loss, _adamw(fused=True))


@torch.no_grad()
def _hugging_face_generate() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    model.generate(_tokens(2, 32), max_new_tokens=12, do_sample=False, pad_token_id=0)


def _assign(chosen: Tensor) -> None:
    """Have the router of a computed run choose as the routing model of a dry one does."""
    if os.environ["SPILLOVER_EMULATOR_DRY"] == "1":
        return
    tokens, count = chosen.shape
    routing = os.environ["SPILLOVER_EMULATOR_ROUTING"]
    imbalance = 1.0 if routing == "uniform" else float(routing)
    busiest = min(tokens, round(imbalance * tokens * count / _EXPERTS))
    by_quota = imbalance > 1
    others = _EXPERTS - by_quota
    rows, turn = [], 0
    for token in range(tokens):
        takes_first = by_quota and (token + 1) * busiest // tokens > token * busiest // tokens
        row = [0] if takes_first else []
        while len(row) < count:
            row.append(turn % others + by_quota)
            turn += 1
        rows.append(row)
    chosen.data.copy_(torch.tensor(rows))  # autograd need not know


def _experts() -> None:
    with torch.device("cuda"):
        model = nn.Sequential(
            nn.Embedding(1000, 192),
            models.MixtureOfExperts(experts=_EXPERTS, route=_assign),
            models.MixtureOfExperts(experts=_EXPERTS, route=_assign),
            nn.Linear(192, 1000),
        )

    def loss() -> Tensor:
        tokens = _tokens()
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    _train(model, loss, _adamw())


def _mixtral(implementation: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=1000,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_local_experts=_EXPERTS,
        output_router_logits=True,
        use_cache=False,
        experts_implementation=implementation,
    )
    with torch.device("cuda"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.train()

    def loss() -> Tensor:
        tokens = _tokens()
        value: Tensor = model(input_ids=tokens, labels=tokens).loss
        return value

    _train(model, loss, _adamw(fused=True))


def _small_llama() -> tuple[models.LanguageModel, Loss]:
    with torch.device("cuda"):
        model = models.LanguageModel(llama=True).to(torch.bfloat16)

    def loss() -> Tensor:
        tokens = _tokens()
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss


def _host_optimizer() -> None:
    from spillover import optim

    model, loss = _small_llama()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, tier="host")
    for _ in range(_STEPS):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def _host_gradients() -> None:
    from spillover import optim

    model, loss = _small_llama()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, offload_gradients=True)
    for step in range(_STEPS + 1):
        for _ in range(1 + step % 2):
            loss().backward()
        clip = optim.clip_grad_norm_ if step % 3 else torch.nn.utils.clip_grad_norm_
        clip(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()


def _offloaded_activations() -> None:
    import spillover

    model, loss = _small_llama()
    optimizer = _sgd(model.parameters())
    for _ in range(_STEPS + 1):  # the first one only looks
        with spillover.offload_activations():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()


def _streamed_parameters() -> None:
    import spillover

    model, loss = _small_llama()
    optimizer = _sgd(model.parameters())
    spillover.stream_parameters(model)
    for _ in range(_STEPS):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def _fsdp2_offloaded() -> None:
    model, loss = _small_llama()
    with models.sharded_on_the_host(model):
        _train(model, loss, _adamw(fused=True))


def _torchao_optimizer() -> None:
    from torchao.optim import CPUOffloadOptimizer

    model, loss = _small_llama()
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    for _ in range(_STEPS):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


_save_on_cpu = functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=True)
_sgd: Optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)

CASES: dict[str, Callable[[], None]] = {
    "gpt fp32 adamw": lambda: _language(_adamw()),
    "gpt fp32 adamw foreach": lambda: _language(_adamw(foreach=True)),
    "gpt fp32 adamw fused": lambda: _language(_adamw(fused=True)),
    "gpt fp32 adamw one by one": lambda: _language(_adamw(foreach=False)),
    "gpt fp32 dropout": lambda: _language(_adamw(), dropout=0.1),
    "gpt bf16": lambda: _language(_adamw(), dtype=torch.bfloat16),
    "gpt amp fp16 with GradScaler": lambda: _language(_adamw(), amp=torch.float16),
    "gpt amp bf16 fused": lambda: _language(_adamw(fused=True), amp=torch.bfloat16),
    "gpt checkpointing": lambda: _language(_adamw(), checkpoint=True),
    "gpt save_on_cpu": lambda: _language(_adamw(), context=_save_on_cpu),
    "llama fp32": lambda: _language(_adamw(), llama=True),
    "llama bf16 checkpointing": lambda: _language(
        _adamw(fused=True), llama=True, dtype=torch.bfloat16, checkpoint=True
    ),
    "llama LoRA": lambda: _language(_adamw(), llama=True, dtype=torch.bfloat16, low_rank=True),
    "conv net": lambda: _vision(models.ConvNet, _sgd),
    "conv net amp": lambda: _vision(models.ConvNet, _sgd, amp=torch.float16),
    "conv net channels-last": lambda: _vision(models.ConvNet, _sgd, channels_last=True),
    "conv net channels-last amp": lambda: _vision(
        models.ConvNet, _adamw(), channels_last=True, amp=torch.float16
    ),
    "u-net": lambda: _vision(models.UNet, _adamw(), dense=True),
    "u-net channels-last bf16": lambda: _vision(
        models.UNet, _adamw(), dense=True, channels_last=True, amp=torch.bfloat16
    ),
    "vision transformer": lambda: _vision(models.VisionTransformer, _adamw()),
    "vision transformer amp": lambda: _vision(
        models.VisionTransformer, _adamw(), amp=torch.float16
    ),
    "lstm and gru": _recurrent,
    "generate with a cache": _generate,
    "fsdp2 CPUOffloadPolicy": _fsdp2_offloaded,
    "spillover AdamW on the host": _host_optimizer,
    "spillover gradients on the host": _host_gradients,
    "spillover offloaded activations": _offloaded_activations,
    "spillover streamed parameters": _streamed_parameters,
}

#: Choose experts by data: their dry runs need a routing model.
ROUTED_CASES: dict[str, Callable[[], None]] = {"mixture of experts": _experts}

#: Need the ``transformers`` package.
HUGGING_FACE_CASES: dict[str, Callable[[], None]] = {
    "hugging face llama": _hugging_face,
    "hugging face llama checkpointing": lambda: _hugging_face(checkpoint=True),
    "hugging face llama eager attention": lambda: _hugging_face(attn_implementation="eager"),
    "hugging face generate": _hugging_face_generate,
}
ROUTED_HUGGING_FACE_CASES: dict[str, Callable[[], None]] = {
    "hugging face mixtral": lambda: _mixtral("grouped_mm"),
    "hugging face mixtral in a loop": lambda: _mixtral("eager"),
}
#: Need the ``torchao`` package.
TORCHAO_CASES = {"torchao CPUOffloadOptimizer": _torchao_optimizer}

UNROUTED = frozenset((*CASES, *HUGGING_FACE_CASES, *TORCHAO_CASES))


def all_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every case that the installed packages allow."""
    yield from CASES.items()
    yield from ROUTED_CASES.items()
    hugging_face = HUGGING_FACE_CASES | ROUTED_HUGGING_FACE_CASES
    for package, cases in (("transformers", hugging_face), ("torchao", TORCHAO_CASES)):
        if importlib.util.find_spec(package) is not None:
            yield from cases.items()
