"""Hugging Face generate: greedy, sampling and beam search, with static and dynamic caches."""

from __future__ import annotations

from typing import Any

from _program import main

# isort: split
import torch
from _llama import VOCABULARY, new_llama

NEEDS = ("transformers",)

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "length_penalty": 0.8},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


def run() -> None:
    """Tokens equal the CPU's for each search; samples are reproducible from the seed."""
    host = new_llama().eval()
    device = new_llama().eval().cuda()
    prompt = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    common = {"max_new_tokens": 10, "min_new_tokens": 10}
    for name, options in SEARCHES.items():
        expected = host.generate(prompt, attention_mask=mask, **common, **options)
        tokens = device.generate(prompt.cuda(), attention_mask=mask.cuda(), **common, **options)
        assert tokens.is_cuda
        assert tokens.tolist() == expected.tolist(), name

    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(
            device.generate(
                prompt.cuda(),
                attention_mask=mask.cuda(),
                do_sample=True,
                top_k=20,
                top_p=0.9,
                temperature=0.8,
                **common,
            ).tolist()
        )
    assert samples[0] == samples[1]

    half = new_llama().eval().to("cuda", torch.bfloat16)
    assert half.generate(prompt.cuda(), attention_mask=mask.cuda(), **common).shape == (2, 17)


if __name__ == "__main__":
    main(run, needs=NEEDS)
